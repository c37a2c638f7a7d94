"""Scores of continuations against one pass over each sequence by itself.

The harness's own tests are in `test_harness.py`; nothing here needs lm-eval.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from hope_jax.config import CMSConfig, ModelConfig
from hope_jax.inference import scoring, streaming
from hope_jax.inference.scoring import Request
from hope_jax.models import language_model
from tests.support.jit import fast_jit
from tests.support.models import init, larger, make

BLOCK, PIECE, BATCH = 8, 8, 3  # pieces of 8 tokens and of 1
LENGTH = 96  # of the full passes
TOLERANCE = 2e-4  # of a sum of up to 40 log-probabilities
NAMES = {
  "transformer": {"context_length": 128},
  "gated_deltanet": {},
  "titans": {
    "cms": CMSConfig(
      hidden=(8, 8, 16), chunk_lengths=(4, 8, 0), signal="next_token"
    )
  },
}


class Model(NamedTuple):
  """A tiny model, and log-probabilities [T, V] of one pass over tokens."""

  config: ModelConfig
  params: Any
  full: Any


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
  """Every border is met by short sequences."""
  monkeypatch.setattr(scoring, "NODE_LENGTH", BLOCK)
  monkeypatch.setattr(scoring, "READ_SIZE", PIECE)
  monkeypatch.setattr(scoring, "LEAST", BLOCK)
  monkeypatch.setattr(scoring, "LEAST_CACHE", 32)


@pytest.fixture(scope="module", params=NAMES)
def model(request):
  config = make(request.param, num_layers=1, **NAMES[request.param])
  _, params, _ = init(config)
  params = larger(params, 4)  # what comes next depends on all that went before
  network = language_model.LanguageModel(config)
  apply = fast_jit(
    lambda tokens: jax.nn.log_softmax(
      language_model.forward(network, params, tokens).logits[0]
    )
  )

  def full(tokens):
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(apply(padded))[: len(tokens)]

  return Model(config, params, full)


def expected(model, request):
  """(log-probability, is greedy) by one pass, each token by itself."""
  tokens = [*request.context, *request.continuation]
  log_probs, total, is_greedy = model.full(tokens), 0.0, True
  for place in range(len(request.context), len(tokens)):
    before = log_probs[place - 1]
    total += float(before[tokens[place]])
    is_greedy &= int(before.argmax()) == tokens[place]
  return total, is_greedy


def score(model, requests, batch_size=BATCH):
  found = dict(
    scoring.score(
      model.params, requests, config=model.config, batch_size=batch_size
    )
  )
  assert sorted(found) == list(range(len(requests)))  # each of them once
  return [found[number] for number in range(len(requests))]


def check(model, requests, **options):
  for request, found in zip(
    requests, score(model, requests, **options), strict=True
  ):
    total, is_greedy = expected(model, request)
    assert found.log_prob == pytest.approx(total, abs=TOLERANCE)
    assert found.is_greedy == is_greedy


RNG = np.random.default_rng(0)
TEXT = RNG.integers(0, 31, 80).tolist()
OTHER = RNG.integers(0, 31, 80).tolist()


def requests_at_borders():
  """Contexts and continuations that end before, at and after the borders of
  blocks and pieces; they share beginnings, or all of it, or nothing."""
  found = []
  for begin in (1, 7, 8, 9, 15, 16, 17, 32, 40):
    for count in (1, 9):
      found.append(Request(TEXT[:begin], TEXT[begin : begin + count]))
  found += [Request(TEXT[:24], OTHER[:n]) for n in (1, 8, 33)]
  found += [Request(OTHER[:5], OTHER[5:9]), Request(OTHER[:5], OTHER[5:40])]
  found += [found[3], found[0]]  # the same again
  return found


def test_scores_equal_a_pass_over_each_sequence(model):
  check(model, requests_at_borders())


def test_numbers_of_rows_do_not_matter(model):
  if model.config.sequence_layer != "transformer":
    return
  short = [x for x in requests_at_borders() if len(sum(x, [])) <= 32]
  check(model, short, batch_size=1)


def test_greedy_is_every_token_and_no_other(model):
  context, greedy = TEXT[:13], []
  for _ in range(6):  # through the border of a block
    greedy.append(int(model.full([*context, *greedy])[-1].argmax()))
  requests = [Request(context, greedy), Request(context[:-1], greedy)]
  for place in range(len(greedy)):
    other = list(greedy)
    other[place] = (other[place] + 1) % 31
    requests.append(Request(context, other))
  found = [score.is_greedy for score in score(model, requests)]
  wanted = [expected(model, request)[1] for request in requests]
  assert found == wanted
  assert found[0] and not any(found[2:])


def test_order_of_requests_does_not_matter(model):
  requests = requests_at_borders()
  forwards = score(model, requests)
  backwards = score(model, requests[::-1])[::-1]
  for one, other in zip(forwards, backwards, strict=True):
    assert one.log_prob == pytest.approx(other.log_prob, abs=TOLERANCE)


def test_states_after_sequences_are_those_of_reading_alone(model):
  if model.config.sequence_layer != "gated_deltanet":
    return
  sequences = [TEXT[:5], TEXT[:16], TEXT[:21], OTHER[:21], [], TEXT[:16]]
  config = model.config
  found = dict(
    scoring.read_all(model.params, sequences, config=config, batch_size=BATCH)
  )
  assert sorted(found) == list(range(len(sequences)))
  for number, tokens in enumerate(sequences):
    read = found[number]
    assert read.position == len(tokens) == int(read.state.processed)
    alone = streaming.extend(
      model.params,
      streaming.start(config),
      np.array([tokens], np.int32),
      config=config,
      read_size=PIECE,
    )
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4),
      read.state,
      alone.state,
    )
    log_probs = [x for part in read.scores for x in part.log_probs.tolist()]
    np.testing.assert_allclose(log_probs, alone.log_probs[0], atol=1e-4)


def test_shared_blocks_are_read_once_in_pieces_of_few_sizes(model, monkeypatch):
  if model.config.sequence_layer != "gated_deltanet":
    return
  sizes, original = [], scoring.read_once

  def counted(params, states, tokens, is_read, **options):
    sizes.append((tokens.shape, int(is_read.sum())))
    return original(params, states, tokens, is_read, **options)

  monkeypatch.setattr(scoring, "read_once", counted)
  score(model, [Request(TEXT[:41], [n]) for n in range(7)])
  assert sizes == [((BATCH, 8), 1)] * 5


def test_tree_holds_every_sequence_where_it_ends():
  sequences = [[1, 2, 3], [1, 2, 3], [1, 2], [1, 2, 4, 5], [], [9]]
  root = scoring.grow(sequences, 2)
  assert root.numbers == [4]
  first, last = scoring._children(root)
  assert (first.tokens, first.numbers) == ([1, 2], [2])
  assert (last.tokens, last.numbers) == ([9], [5])
  ends = {tuple(x.tokens): x.numbers for x in scoring._children(first)}
  assert ends == {(4, 5): [3], (3,): [0, 1]}
  # One ends where another goes on.
  (node,) = scoring._children(scoring.grow([[1, 2], [1, 2, 3]], 2))
  assert (node.tokens, node.numbers) == ([1, 2], [0]) and node.children
  # Blocks that nothing branches from are one node.
  (chain,) = scoring._children(scoring.grow([[1, 2, 3, 4, 5]], 2))
  assert (chain.tokens, chain.numbers) == ([1, 2, 3, 4, 5], [0])


def test_pieces_begin_at_multiples_of_their_size(monkeypatch):
  sizes = []

  def read_once(_, states, tokens, is_read, **options):
    sizes.append(tokens.shape[1])
    return streaming.Scores(np.zeros(tokens.shape), tokens > 0), states

  monkeypatch.setattr(scoring, "READ_SIZE", 64)
  monkeypatch.setattr(scoring, "read_once", read_once)
  before: Any = scoring.Read(8, (), {"state": np.zeros(2)})
  scoring.read(
    None, [scoring.Row(before, TEXT[:72])], config=make("lstm"), batch_size=1
  )
  assert sizes == [8] * 9


def test_blocks_end_where_levels_do():
  cms = CMSConfig(hidden=(8, 8), chunk_lengths=(16, 0), signal="next_token")
  assert scoring.block_length(make("titans", cms=cms)) == 16
  assert scoring.block_length(make("titans")) == BLOCK


def test_caches_are_of_few_sizes():
  config = make("transformer", context_length=1 << 20)
  sizes = [
    scoring.with_cache(config, count).context_length
    for count in (1, 32, 33, 64, 65, 1000)
  ]
  assert sizes == [32, 32, 64, 64, 128, 1024]
  recurrent = make("gated_deltanet")
  assert scoring.with_cache(recurrent, 1000) is recurrent


def test_rows_that_wait_are_as_before(model):
  config = model.config
  states = scoring.stack([streaming.start(config)] * 2, BATCH)
  tokens = np.array([TEXT[:1], OTHER[:1], TEXT[1:2]], np.int32)
  is_read = np.array([False, True, False])
  before = jax.device_get(states)
  _, after = scoring.read_once(
    model.params, states, tokens, is_read, config=config
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x[::2], y[::2]),
    before,
    jax.device_get(after),
  )
  assert after.processed.tolist() == [0, 1, 0]


def test_batches_keep_the_order_and_the_rest():
  assert list(scoring.batched(range(5), 2)) == [[0, 1], [2, 3], [4]]
