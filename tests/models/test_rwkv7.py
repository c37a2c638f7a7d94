"""RWKV-7 against its equations, one token after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.config import ConfigError
from hope_jax.models import fast_state, language_model
from tests.support.jit import fast_jit
from tests.support.models import B, T, init, make

STARTS = np.repeat([0, 1, 2], [9, 1, T - 10])
MOVED = ("shift_", "base", "key_", "norm", "bonus", "bias", "scale")


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def layer_norm(x, p):
  x = x - x.mean(-1, keepdims=True)
  return (
    x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"]
    + (p["bias"])
  )


def low_rank(p, name, x, f=lambda x: x):
  return f(x @ p[f"{name}_down"]["kernel"]) @ p[f"{name}_up"]["kernel"]


def time_mix(p, x, last, state, first, heads):
  """One token x [D] after `last`: y, S of all heads, and v.

  `first`: v of the first layer, None in it.
  """
  mixed = lambda name: x + (last - x) * p["projections"][f"shift_{name}"]
  r, k, v = (
    mixed(name) @ p["projections"][name]["kernel"]
    for name in ("receptance", "key", "value")
  )
  g = p["gates"]
  d = g["decay_base"] + low_rank(g, "decay", mixed("decay"), np.tanh)
  w = np.exp(-np.exp(-0.5) * sigmoid(d))
  a = sigmoid(g["rate_base"] + low_rank(g, "rate", mixed("rate")))
  gate = low_rank(g, "gate", mixed("gate"), sigmoid)
  if first is not None:
    share = g["share_base"] + low_rank(g, "share", mixed("value"))
    v = v + (first - v) * sigmoid(share)
  kappa, k = k * g["key_scale"], k * (1 + (a - 1) * g["key_rate"])
  read, (dim,) = p["readout"], {len(x) // heads}
  outputs, new = [], []
  for h in range(heads):
    here = slice(h * dim, (h + 1) * dim)
    unit = kappa[here] / np.sqrt(np.sum(kappa[here] ** 2) + 1e-6)
    s = state[h] @ (np.diag(w[here]) - np.outer(unit, a[here] * unit))
    s = s + np.outer(v[here], k[here])
    o = s @ r[here]
    o = (o - o.mean()) / np.sqrt(o.var() + dim * 1e-5)
    o = o * read["norm_scale"][here] + read["norm_bias"][here]
    bonus = np.sum(r[here] * read["bonus"][here] * k[here])
    outputs.append(o + bonus * v[here])
    new.append(s)
  y = (np.concatenate(outputs) * gate) @ read["output"]["kernel"]
  return y, np.stack(new), v


def plain_model(params, tokens, documents, heads):
  """Logits [T, V] of one sequence, all layers of a token before the next."""
  table, stacked = params["embed"]["embedding"], params["blocks"]
  layers = [
    jax.tree.map(lambda w, number=number: w[number], stacked)
    for number in range(stacked["norm_ffn"]["scale"].shape[0])
  ]
  width, logits = table.shape[1], []
  for t, token in enumerate(tokens):
    if t == 0 or documents[t] != documents[t - 1]:
      state = np.zeros((len(layers), heads, width // heads, width // heads))
      last = np.zeros((2, len(layers), width))
    x, first = layer_norm(table[token], params["norm_in"]), None
    for number, p in enumerate(layers):
      n = layer_norm(x, p["norm_mixer"])
      y, state[number], v = time_mix(
        p["mixer"], n, last[0, number], state[number], first, heads
      )
      first = v if number == 0 else first
      x, last[0, number] = x + y, n
      n = layer_norm(x, p["norm_ffn"])
      mixed = n + (last[1, number] - n) * p["ffn"]["shift_key"]
      hidden = np.maximum(mixed @ p["ffn"]["key"]["kernel"], 0) ** 2
      x, last[1, number] = x + hidden @ p["ffn"]["value"]["kernel"], n
    logits.append(layer_norm(x, params["norm_out"]) @ table.T)
  return np.stack(logits)


def moved(params):
  """Numbers per channel off their start, where their place would not show."""
  rng = np.random.default_rng(0)
  return jax.tree_util.tree_map_with_path(
    lambda path, x: (
      x + 0.3 * rng.normal(size=x.shape).astype(x.dtype)
      if any(name in jax.tree_util.keystr(path) for name in MOVED)
      else x
    ),
    params,
  )


@pytest.fixture(scope="module")
def case():
  """Three layers of two heads of 64, some documents, and the right logits."""
  model, params, tokens = init(make("rwkv7", width=128, num_layers=3))
  params = moved(params)
  exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  tokens = np.asarray(tokens)
  expected = [plain_model(exact, row, STARTS, heads=2) for row in tokens]
  return model, params, tokens, np.stack(expected)


def test_rwkv7_equals_its_equations(case):
  model, params, tokens, expected = case
  documents = jnp.asarray(STARTS)[None].repeat(B, 0)
  run = fast_jit(model.apply)
  logits = run({"params": params}, tokens, None, documents).logits
  np.testing.assert_allclose(logits, expected, atol=3e-5)


def test_first_document_continues_the_state(case):
  """In pieces that begin inside a document, with one, and after one."""
  model, params, tokens, expected = case
  state, parts = language_model.init_state(model.config, B), []
  run = fast_jit(model.apply)
  for piece in (slice(0, 7), slice(7, 10), slice(10, 17), slice(17, T)):
    here = STARTS[piece] - STARTS[max(piece.start - 1, 0)]
    documents = jnp.asarray(here)[None].repeat(B, 0)
    out = run({"params": params}, tokens[:, piece], state, documents)
    parts.append(out.logits)
    state = out.state
  logits = jnp.concatenate(parts, axis=1)
  np.testing.assert_allclose(logits, expected, atol=3e-5)
  assert isinstance(state, fast_state.BlockState)
  np.testing.assert_array_equal(state.ffn.shape, (3, B, 128))


def test_initial_values_are_the_authors():
  """Per channel they depend on the layer, inside the scan over layers."""
  width, num_layers = 128, 3
  config = make("rwkv7", width=width, num_layers=num_layers)
  tokens = jnp.zeros((1, 4), jnp.int32)
  shown = language_model.LanguageModel(config).init(jax.random.key(0), tokens)
  blocks = jax.tree.map(np.asarray, shown["params"]["blocks"])
  blocks = jax.tree.map(
    lambda x: x.value, blocks, is_leaf=lambda x: hasattr(x, "value")
  )
  mixer = blocks["mixer"]
  i = np.arange(width)
  for layer in range(num_layers):
    down, up = 1 - layer / num_layers, layer / (num_layers - 1)
    close = lambda x, y, layer=layer: np.testing.assert_allclose(
      x[layer], y, atol=2e-6
    )
    shift = mixer["projections"]
    close(shift["shift_receptance"], 1 - (i / width) ** (0.2 * down))
    close(shift["shift_value"], 1 - (i / width) ** (0.4 * down) - 0.6 * up)
    speed = (i / (width - 1)) ** (0.85 + up**0.5)
    close(mixer["gates"]["decay_base"], -6.5 + 5 * speed)
    close(mixer["readout"]["norm_scale"], ((1 + layer) / num_layers) ** 0.7)
    close(blocks["ffn"]["shift_key"], 1 - (i / width) ** (down**4))
  for zero in (mixer["readout"]["output"], blocks["ffn"]["value"]):
    assert not zero["kernel"].any()
  assert mixer["gates"]["gate_down"]["kernel"].shape == (3, width, 32)
  up = mixer["gates"]["gate_up"]["kernel"][1]
  np.testing.assert_allclose(up @ up.T, 0.01 * np.eye(32), atol=1e-6)
  key, value = (shift[name]["kernel"] for name in ("key", "value"))
  assert np.abs(key).max() < 0.05 / width**0.5
  assert 0.4 / width**0.5 < np.abs(value).max() < 0.5 / width**0.5


def test_width_must_hold_whole_heads():
  with pytest.raises(ConfigError, match="heads of 64 do not divide it"):
    make("rwkv7", width=96)
