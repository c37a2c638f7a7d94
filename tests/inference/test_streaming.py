"""Reading in any parts equals one pass; texts, levels, a long stream."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import strategies as st

from hope_jax.config import CMSConfig, ConfigError, ModelConfig
from hope_jax.config.layers import LAYERS
from hope_jax.data.tokenizer import Bytes
from hope_jax.inference import reading, streaming
from hope_jax.models import fast_state, language_model
from tests.support.jit import fast_jit
from tests.support.models import B, make

# Pieces of 8 tokens and of 1: whole chunks of 4 and 8, parts of one of 16.
T, PIECE = 150, 8
CMS = CMSConfig(hidden=(8, 8, 16), chunk_lengths=(8, 16, 0))
PARTS = [[150], [1, 2, 3, 5, 7, 13, 119], [90, 1, 1, 58]]


class Model(NamedTuple):
  """A tiny model, tokens [B, T], logits [B, T, V] of one pass, and how many
  programs were compiled before."""

  config: ModelConfig
  params: Any
  tokens: np.ndarray
  full: jax.Array
  programs: int


NAMES = {
  "hope": ("hope", CMS),
  "transformer": ("transformer", CMSConfig()),
  "next_token": ("titans", dataclasses.replace(CMS, signal="next_token")),
  "retnet": ("retnet", CMSConfig()),
  "samba": ("samba", CMSConfig()),
  "srwm": ("srwm", CMSConfig()),
}


@pytest.fixture(scope="module", params=NAMES)
def model(request):
  layer, cms = NAMES[request.param]
  blocks = len(LAYERS[layer].blocks or (layer,))
  config = make(layer, num_layers=blocks, context_length=T, cms=cms)
  network = language_model.LanguageModel(config)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, config.vocab_size, (B, T))
  shapes = jax.eval_shape(network.init, jax.random.key(0), tokens)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype),
    nn.unbox(shapes["params"]),
  )
  full = fast_jit(lambda x: language_model.forward(network, params, x).logits)
  programs = streaming.read_once._cache_size()
  return Model(config, params, tokens, full(tokens), programs)


def read(model, parts, begin=0, state=None):
  """The extensions of `parts` tokens each."""
  config, params, tokens, *_ = model
  state = state or streaming.start(config, B)
  found = []
  for count in parts:
    part = tokens[:, begin : begin + count]
    found.append(
      streaming.extend(params, state, part, config=config, read_size=PIECE)
    )
    state, begin = found[-1].state, begin + count
  return found


def state_bytes(state):
  return sum(x.nbytes for x in jax.tree.leaves(state))


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_extend_in_parts_equals_one_pass(model, parts):
  _, _, tokens, full, _ = model
  found = read(model, parts)
  log_probs = np.concatenate([f.log_probs for f in found], axis=1)
  wanted = jax.nn.log_softmax(full[:, :-1])
  wanted = np.take_along_axis(wanted, tokens[:, 1:, None], axis=-1)[..., 0]
  assert np.isnan(log_probs[:, 0]).all()
  np.testing.assert_allclose(log_probs[:, 1:], wanted, atol=1e-4, rtol=1e-4)
  ends = np.cumsum(parts) - 1
  for end, extension in zip(ends, found, strict=True):
    np.testing.assert_allclose(
      extension.logits, full[:, end], atol=1e-4, rtol=1e-4
    )


def test_extend_never_reads_a_token_twice(model, monkeypatch):
  config, params, tokens, *_ = model
  sent, real = [], streaming.read_once

  def spy(params, state, piece, **kwargs):
    sent.append(np.asarray(piece))
    return real(params, state, piece, **kwargs)

  monkeypatch.setattr(streaming, "read_once", spy)
  (*_, last) = read(model, PARTS[1])
  np.testing.assert_array_equal(np.concatenate(sent, axis=1), tokens)
  assert int(last.state.processed) == T
  assert {piece.shape[1] for piece in sent} == {8, 1}


def test_one_program_per_size_of_pieces(model):
  read(model, PARTS[1])
  read(model, PARTS[2])
  assert streaming.read_once._cache_size() - model.programs == 2


def test_state_does_not_grow(model):
  config, *_ = model
  found = read(model, PARTS[1])
  sizes = {state_bytes(extension.state) for extension in found}
  assert sizes == {state_bytes(streaming.start(config, B))}
  longer = dataclasses.replace(config, context_length=9 * T)
  grows = state_bytes(streaming.start(longer, B)) not in sizes
  assert grows == config.has_longest_context


def test_extend_refuses_what_it_cannot_read(model):
  config, params, tokens, *_ = model
  state = streaming.start(config, B)
  run = lambda x: streaming.extend(params, state, x, config=config)
  with pytest.raises(ValueError, match="tokens.shape=.150,. is not .2, T."):
    run(tokens[0])
  with pytest.raises(ValueError, match="tokens 0 .. 31 are not all below"):
    run(np.array([[0, 31], [0, 0]]))
  if config.has_longest_context:
    with pytest.raises(ConfigError, match="0 tokens and 151 more.*=150"):
      run(np.zeros((B, T + 1), np.int32))
  assert not np.isnan(jax.tree.leaves(state.fast)[0]).any()  # not used up


@hypothesis.given(st.integers(0, 10**6), st.integers(0, 10**5))
def test_pieces_are_aligned_and_few(position, count):
  sizes = list(streaming.read_sizes(position, count, 4096))
  begins = position + np.cumsum([0, *sizes])
  assert begins[-1] == position + count
  for begin, size in zip(begins, sizes, strict=False):
    assert begin % size == 0 and size in (4096, 512, 64, 8, 1)
  assert len(sizes) <= count // 4096 + 2 * 4 * 7


@pytest.mark.parametrize("text", ["ö€😀" * 9, "one\ntwo\r\n\n" * 7, "a", "\n"])
@pytest.mark.parametrize("size", [1, 5, 64])
def test_read_text_yields_the_whole_text(tmp_path, monkeypatch, text, size):
  monkeypatch.setattr(reading, "TEXT", 5)
  path = epath.Path(tmp_path / "text")
  path.write_bytes(text.encode())
  parts = list(reading.read_text(path, Bytes(), 3, size))
  assert b"".join(part.tobytes() for part in parts) == text.encode()
  sizes = [len(part) for part in parts]
  assert all(s == size for s in sizes[1:-1])
  assert sizes[0] == min(3, len(text.encode()))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "is empty"),
    (b"good\nbad \xff" + b"x" * 9, "not UTF-8 text: byte 9 is 0xff"),
    (b"\x80" * 20, "not UTF-8 text: byte 0"),
    ("cut short €".encode()[:-1], "not UTF-8 text: byte 10"),
    (None, "cannot read .*No such file"),
  ],
)
def test_unreadable_texts_are_one_line(tmp_path, monkeypatch, content, message):
  monkeypatch.setattr(reading, "TEXT", 6)
  path = epath.Path(tmp_path / "text")
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ConfigError, match=message):
    list(reading.read_text(path, Bytes(), 3, 3))


@pytest.fixture(scope="module")
def written(model):
  """A state in the middle of a chunk."""
  return read(model, [21])[-1].state


def test_reset_of_one_level_leaves_the_others(model, written):
  config, params, *_ = model
  measure = lambda state: fast_state.relative_change(params, state.fast, config)
  taken = lambda levels: jax.tree.map(
    jnp.subtract, written.fast, streaming.reset(written, levels, config).fast
  )
  before = measure(written)
  assert all(change > 0 for change in before.values())
  each = []
  for level in config.fast_levels:
    after = measure(streaming.reset(written, [level], config))
    assert after == before | {level: 0.0}
    each.append(taken([level]))
  # No weight, momentum or pending part belongs to two levels.
  total = taken([])
  for part in each:
    total = jax.tree.map(jnp.add, total, part)
  jax.tree.map(np.testing.assert_array_equal, total, taken(config.fast_levels))


def test_reset_of_all_levels_leaves_places_and_convolutions(model, written):
  config, *_ = model
  empty = streaming.reset(written, config.fast_levels, config).fast
  new = streaming.start(config, B).fast

  def check(path, x, start, old):
    name = jax.tree_util.keystr(path)
    is_level = any(level in name for level in ("memory", "boxes", "cms_"))
    is_level &= bool(config.fast_levels)  # a linear model has none
    is_kept = not is_level or name.endswith(".position")
    np.testing.assert_array_equal(x, old if is_kept else start)

  jax.tree_util.tree_map_with_path(check, empty, new, written.fast)


def test_relative_change_of_a_memory_is_a_ratio_of_norms(model, written):
  config, params, *_ = model
  if config.sequence_layer != "titans":
    return
  weight = written.fast.mixer.memory.now.weight
  slow = params["blocks"]["mixer"]["initial"]

  def norm(*parts):
    squares = [np.square(x).sum((-2, -1)) for x in parts]
    return np.sqrt(sum(squares))

  ratio = norm(weight.hidden, weight.output) / norm(
    slow["memory_hidden"][:, None], slow["memory_output"][:, None]
  )
  found = fast_state.relative_change(params, written.fast, config)["memory"]
  np.testing.assert_allclose(found, np.median(ratio), rtol=1e-5)


def random_state(config):
  """Random parameters and a random state, without a pass; 3 sequences."""
  rng = np.random.default_rng(0)
  network = language_model.LanguageModel(config)
  tokens = np.zeros((1, 8), np.int32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), tokens)["params"]
  normal = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
  params = jax.tree.map(normal, nn.unbox(shapes))
  state = streaming.start(config, 3)
  state = jax.tree.map(lambda x: normal(x) if x.ndim > 1 else x, state)
  return params, state


def changes(initial, weights):
  """|D| / |M_0| [L, ...] of weights by name."""
  norm = lambda parts: np.sqrt(
    sum(np.square(np.asarray(x)).sum((-2, -1)) for x in parts)
  )
  return norm(weights) / norm([x[:, None] for x in initial])


def test_relative_change_of_levels_is_of_the_layers_that_learn():
  cms = dataclasses.replace(CMS, signal="next_token", learning_share=0.5)
  config = make("titans", num_layers=4, context_length=T, cms=cms)
  params, state = random_state(config)
  found = fast_state.relative_change(params, state.fast, config)
  for level in ("cms_0", "cms_1"):
    slow = params["blocks"]["cms"][f"level_{level[-1]}"]
    fast = state.fast.levels[level].weight
    ratios = changes(
      [slow[name][2:] for name in ("gate", "up", "down")],
      [fast.gate, fast.up, fast.down],
    )
    wanted = np.median(np.median(ratios, axis=1))  # of each layer, of layers
    np.testing.assert_allclose(found[level], wanted, rtol=1e-5)


def test_relative_change_of_projections_is_of_each_alone():
  config = make("hope", num_layers=3, context_length=T, cms=CMS)
  params, state = random_state(config)
  found = fast_state.relative_change(params, state.fast, config)
  slow = params["blocks"]["mixer"]["initial"]
  fast = state.fast.mixer.boxes.now.weight
  for number, (level, kind, index) in enumerate(
    [
      ("k", "projection", 0),
      ("v", "projection", 1),
      ("q", "projection", 2),
      ("eta", "gate", 0),
      ("alpha", "gate", 1),
    ]
  ):
    rows = slice(8 * number, 8 * number + 8)  # of the shared hidden layer
    pick = lambda output, hidden, index=index, rows=rows: [
      output[..., index, :, :],
      hidden[..., rows, :],
    ]
    ratios = changes(
      pick(slow[f"boxes_{kind}"], slow["boxes_hidden"]),
      pick(getattr(fast, kind), fast.hidden),
    )
    wanted = np.median(np.median(ratios, axis=(1, 2)))
    np.testing.assert_allclose(found[level], wanted, rtol=1e-5)


def test_likeliest_token_and_its_log_probability():
  logits = jnp.log(jnp.asarray([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]))
  found = streaming.score(logits, jnp.asarray([1, 2]))
  np.testing.assert_allclose(found.log_probs, np.log([0.5, 0.1]), rtol=1e-6)
  assert found.is_likeliest.tolist() == [True, False]
