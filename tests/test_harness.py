"""Runs under lm-eval: scores and texts against full passes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from hope_jax.config import CMSConfig, Config, ConfigError, DataConfig
from hope_jax.data import tokenizer as tokenizer_lib
from hope_jax.data.tokenizer import Bytes
from hope_jax.inference import generation, scoring, trained
from hope_jax.models import language_model
from hope_jax.runs import checkpoints, workdir
from hope_jax.training import sharding, step
from tests.support.jit import fast_jit
from tests.support.models import make
from tests.support.tiers import slow_case

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from hope_jax.inference.lm_eval_model import HopeLM

CONTEXT = 120  # of attention
LENGTH = 160  # of the full passes
TOLERANCE = 3e-4  # of a sum of up to 120 log-probabilities
NAMES = {
  "transformer": {"context_length": CONTEXT},
  "titans": {},
  "hope": {
    "cms": CMSConfig(
      hidden=(8, 8, 16), chunk_lengths=(8, 16, 0), signal="next_token"
    )
  },
  "gated_deltanet": {},
}
SHOTS = "Q: What is the colour of the sea?\nA: blue\n\n" * 2
PAIRS = [
  (SHOTS + "Q: And of the sky?\nA:", " blue"),
  (SHOTS + "Q: And of the sky?\nA:", " a dull grey, as in all pictures"),
  (SHOTS + "Q: And of grass?\nA:", " green"),
  ("Q: Who?\nA:", " é"),
  ("Q: Who?\nA: ", "nobody at all"),
  ("", "So it begins"),
  ("x", "y"),
  (SHOTS[:60], SHOTS[60:75]),  # needs a larger cache than its context
]


@pytest.fixture(autouse=True)
def one_length(monkeypatch):
  """Of padded blocks: fewer programs to compile."""
  monkeypatch.setattr(scoring, "LEAST", scoring.NODE_LENGTH)


def make_run(folder, model):
  """A run with a checkpoint of random parameters, opened."""
  config = Config(model=model, data=DataConfig(sequence_length=32))
  workdir.claim(folder, config, {})
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  state = step.build(config, mesh).abstract_state
  rng = np.random.default_rng(0)
  normal = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
  params = jax.tree.map(normal, state.params)
  manager = checkpoints.open_manager(folder, config.train)
  checkpoints.save(manager, 0, zero.replace(params=params))
  manager.close()
  return trained.open_run(folder)


@pytest.fixture(
  scope="module",
  params=[slow_case(name) if name == "hope" else name for name in NAMES],
)
def run(request, tmp_path_factory):
  """A run of each kind of model."""
  fields = NAMES[request.param]
  model = make(request.param, vocab_size=256, num_layers=1, **fields)
  return make_run(epath.Path(tmp_path_factory.mktemp("run")), model)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
  model = make("transformer", vocab_size=256, num_layers=1, context_length=512)
  return make_run(epath.Path(tmp_path_factory.mktemp("run")), model)


@pytest.fixture(scope="module")
def full(run):
  """Log-probabilities [T, V] of one pass over LENGTH places at the most."""
  config = run.config.model
  network = language_model.LanguageModel(config)
  apply = fast_jit(
    lambda tokens: jax.nn.log_softmax(
      language_model.forward(network, run.params, tokens).logits[0]
    )
  )

  def log_probs(tokens):
    assert len(tokens) <= LENGTH
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(apply(padded))

  return log_probs


def expected(full, context, continuation):
  """(log-probability, is greedy) of a continuation, by a full pass."""
  tokens = [*context, *continuation]
  log_probs = full(tokens[:-1])[len(context) - 1 : len(tokens) - 1]
  chosen = log_probs[np.arange(len(continuation)), list(continuation)]
  return chosen.sum(), bool((log_probs.argmax(axis=1) == continuation).all())


def instances(kind, arguments):
  return [Instance(kind, {}, args, n) for n, args in enumerate(arguments)]


def ask(run, kind, arguments, batch_size=8):
  model = HopeLM(run, batch_size=batch_size)
  with sharding.activate(run.mesh):
    return getattr(model, kind)(instances(kind, arguments))


def bounded(run, context, continuation):
  """Bytes of a request, as attention can read them."""
  context, continuation = context.encode() or b"\n", continuation.encode()
  spaces = len(context) - len(context.rstrip(b" "))
  if spaces:
    context, moved = context[:-spaces], context[-spaces:]
    continuation = moved + continuation
  if run.config.model.has_attention:
    context = context[-(CONTEXT + 1 - len(continuation)) :]
  return list(context), list(continuation)


def test_scores_equal_a_full_pass(run, full, monkeypatch):
  monkeypatch.setattr(scoring, "LEAST_CACHE", scoring.NODE_LENGTH)
  found = ask(run, "loglikelihood", PAIRS)
  for pair, (log_prob, is_greedy) in zip(PAIRS, found, strict=True):
    context, continuation = bounded(run, *pair)
    wanted, greedy = expected(full, context, continuation)
    assert (
      log_prob == pytest.approx(wanted, abs=TOLERANCE) and is_greedy == greedy
    )


def test_only_attention_forgets_the_beginning(run):
  model = HopeLM(run)
  context, continuation = list(range(200)), [7] * 5
  kept = context
  if run.config.model.has_attention:
    kept = context[-(CONTEXT + 1 - 5) :]
    with pytest.raises(ConfigError, match="121 tokens is too long.*=120"):
      model._bounded(context, [7] * (CONTEXT + 1))
  plan = model._bounded(context, continuation)
  assert plan.parts == [(kept, continuation)]
  assert plan.cut == len(context) - len(kept)


def test_attention_in_a_window_reads_any_length(transformer):
  lengths = []
  for window in (0, 16):
    config = transformer.config
    model = dataclasses.replace(config.model, attention_window=window)
    config = dataclasses.replace(config, model=model)
    run = transformer._replace(config=config)
    lengths.append(HopeLM(run).max_length)
    assert (scoring.with_cache(model, 1000) == model) == bool(window)
  assert lengths == [512, None]


def test_texts_begin_with_the_token_of_their_tokenizer(transformer):
  class WithBegin(Bytes):
    bos = 7

  model = HopeLM(transformer._replace(tokenizer=WithBegin()))
  assert model.prefix_token_id == 7 and model.tok_encode("\a") == [7]
  pair = model._encode_pair("a ", "b")
  assert pair == ([7, *b"a"], [*b" b"])
  (plan,) = model.plan(
    "loglikelihood_rolling", instances("loglikelihood_rolling", [("ab",)])
  )
  assert plan.parts == [scoring.Request([7], [*b"ab"])]


def test_rolling_scores_every_token_once(run, full):
  text = SHOTS + "and so on"
  found, empty = ask(run, "loglikelihood_rolling", [(text,), ("",)])
  assert empty == 0
  wanted, _ = expected(full, b"\n", text.encode())
  assert found == pytest.approx(wanted, abs=TOLERANCE)
  if run.config.model.has_attention:
    long = (text * 2).encode()
    (found,) = ask(run, "loglikelihood_rolling", [(text * 2,)])
    first, _ = expected(full, b"\n", long[:CONTEXT])
    begin = len(long) - CONTEXT - 1  # as much context as there can be
    rest, _ = expected(full, long[begin:CONTEXT], long[CONTEXT:])
    assert found == pytest.approx(first + rest, abs=TOLERANCE)


def test_what_is_shared_is_read_once(transformer, monkeypatch):
  count, original = [0], scoring.read_once

  def counted(params, states, tokens, is_read, **options):
    count[0] += int(is_read.sum()) * tokens.shape[1]
    return original(params, states, tokens, is_read, **options)

  monkeypatch.setattr(scoring, "read_once", counted)
  header = "".join(map(chr, range(32, 107)))  # 75 bytes: a block and a part
  pairs = [(header + end, choice) for end in "abc" for choice in ("x", "yz")]
  shared = ask(transformer, "loglikelihood", pairs)
  assert count == [64]
  apart = [ask(transformer, "loglikelihood", [pair])[0] for pair in pairs]
  np.testing.assert_allclose(shared, apart, atol=TOLERANCE)


def test_batches_do_not_matter_and_few_programs_are_compiled(transformer):
  together = ask(transformer, "loglikelihood", PAIRS)
  alone = ask(transformer, "loglikelihood", PAIRS, batch_size=1)
  np.testing.assert_allclose(together, alone, atol=TOLERANCE)
  programs = lambda: (
    scoring.read_once._cache_size() + scoring.read_last._cache_size()
  )
  before = programs()
  others = [(c[1:] + "and more", " of " + t) for c, t in PAIRS[:4]]
  ask(transformer, "loglikelihood", others * 3)
  assert programs() == before


def test_greedy_text_is_greedy_and_ends_before_until(transformer):
  contexts, options = (
    ["Q: And of the sky?", "Q: Who?", ""],
    {"max_gen_toks": 12},
  )
  texts = ask(transformer, "generate_until", [(c, options) for c in contexts])
  with sharding.activate(transformer.mesh):
    wanted = generation.generate(
      transformer.params,
      [Bytes().encode(context or "\n") for context in contexts],
      config=transformer.config.model,
      count=12,
      sampling=generation.Sampling(temperature=0.0),
      vocab_size=256,
    )
  assert texts == [Bytes().decode(tokens) for tokens in wanted]
  until = {"until": [texts[0][4:6], "never there"], **options}
  model = HopeLM(transformer)
  asked = [(contexts[0], until), (contexts[0], options)]
  with sharding.activate(transformer.mesh):
    stopped, _ = model.generate_until(instances("generate_until", asked))
  assert stopped == texts[0][: texts[0].index(texts[0][4:6])]
  assert model.unfinished.total() == 1


def test_draws_depend_on_the_request_alone(transformer):
  options = {"max_gen_toks": 6, "do_sample": True, "temperature": 2.0}
  asked = [("Some text", options)] * 3 + [("and more", options)]
  texts = ask(transformer, "generate_until", asked)
  assert texts == ask(transformer, "generate_until", asked, batch_size=1)
  assert len(set(texts)) == 4


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"max_gen_toks": 512}, "max_gen_toks=512 leaves no room"),
    ({"max_gen_toks": 0}, "max_gen_toks=0 must be positive"),
    ({"temperature": -1.0, "do_sample": True}, "temperature=-1.0"),
  ],
)
def test_tasks_that_cannot_be_drawn(transformer, options, message):
  with pytest.raises(ConfigError, match=message):
    ask(transformer, "generate_until", [("x", options)])


def test_tokens_that_cross_the_border_are_the_continuation(transformer):
  text = ["in the house of the king the king is in the house\n"] * 40
  model = tokenizer_lib.train(text, 274)
  tokenizer = tokenizer_lib.SentencePiece(model, "small")
  model = HopeLM(transformer._replace(tokenizer=tokenizer))
  whole = tokenizer.encode("in the house of the king").tolist()
  for context, rest in (("in the house of", " the king"), ("in the ", "house")):
    begin, end = model._encode_pair(context, rest)
    text = tokenizer.encode(context.rstrip() + " " + rest.lstrip()).tolist()
    assert begin + end == text == whole[: len(text)] and begin and end
  assert tokenizer.decode(np.asarray([model.prefix_token_id])) == "\n"
