"""Attention with a window and with documents, against every pair by itself."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models import attention
from tests.models.test_equations import rotary, slow_projection
from tests.support.jit import fast_jit
from tests.support.models import make

B, T = 2, 40
# Documents of row 0 and of row 1, first tokens.
BORDERS = ((0, 3, 16, 17, 30), (0, 24))
SEGMENTS = np.stack(
  [np.searchsorted(borders, np.arange(T), "right") - 1 for borders in BORDERS]
)


def layer(**fields):
  """A layer of attention, its parameters and an input."""
  config = make("transformer", **fields)
  module = attention.Attention(config)
  x = jax.random.normal(jax.random.key(0), (B, T, config.width))
  params = nn.unbox(module.init(jax.random.key(1), x))
  params = jax.tree.map(lambda x: 10 * x, params)
  return config, fast_jit(module.apply), params, x


def plain(params, x_TD, config, window, numbers):
  """y [T, D] of one sequence without convolution."""
  p, tokens, heads = params["params"], len(x_TD), []
  seen = np.tril(np.ones((tokens, tokens)))
  if window:
    seen -= np.tril(np.ones((tokens, tokens)), -window)
  seen *= numbers[:, None] == numbers[None]
  projected = (
    np.split(np.asarray(slow_projection(p, name, x_TD)), config.num_heads, 1)
    for name in ("query", "key", "value")
  )
  for q, k, v in zip(*projected, strict=True):
    q, k = (np.asarray(rotary(x, config.rope_base)) for x in (q, k))
    weights = seen * np.exp(q @ k.T / q.shape[1] ** 0.5)
    heads.append(weights @ v / weights.sum(axis=1, keepdims=True))
  return np.hstack(heads) @ p["output"]["kernel"]


@pytest.mark.parametrize("window", [0, 1, 7, 39, 64])
@pytest.mark.parametrize(
  "documents", [None, SEGMENTS], ids=["one", "documents"]
)
def test_attention_equals_a_mask_over_all_pairs(window, documents):
  config, apply, params, x = layer(conv_window=0, attention_window=window)
  y = apply(params, x, None, documents).y
  numbers = np.zeros((B, T)) if documents is None else documents
  for row in range(B):
    expected = plain(params, x[row], config, window, numbers[row])
    np.testing.assert_allclose(y[row], expected, atol=2e-5)


PIECES = {
  "short": [1] * 10 + [3, 1, 5, 3, 1, 5, 3, 1, 5, 3],
  "long": [1, 20, 1, 1, 17],
}


@pytest.mark.parametrize("window", [0, 6, 64])
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize(
  "documents", [SEGMENTS, None], ids=["documents", "one"]
)
def test_pieces_equal_one_pass(window, pieces, documents):
  """Pieces shorter and longer than the window; new documents anywhere."""
  config, apply, params, x = layer(attention_window=window)
  whole = apply(params, x, None, documents).y
  state = attention.init_state(config, B)
  sizes = jax.tree.map(jnp.shape, state)
  outputs, begin, last = [], 0, np.zeros((B, 1), int)
  for count in PIECES[pieces]:
    piece = slice(begin, begin + count)
    numbers = None
    if documents is not None:
      numbers = documents[:, piece] - last
      last = documents[:, piece][:, -1:]
    y, _, _, state = apply(params, x[:, piece], state, numbers)
    outputs.append(y)
    begin += count
  assert begin == T and jax.tree.map(jnp.shape, state) == sizes
  np.testing.assert_allclose(
    jnp.concatenate(outputs, axis=1), whole, atol=1e-5, rtol=1e-4
  )


def test_cost_of_a_window_grows_with_the_tokens():
  """Not with their square: twice the tokens, twice the work."""

  def largest(tokens):
    config = make("transformer", attention_window=8)
    module = attention.Attention(config)
    x = jax.ShapeDtypeStruct((1, tokens, config.width), jnp.float32)
    traced = jax.make_jaxpr(
      lambda x: module.init_with_output(jax.random.key(0), x)[0].y
    )(x)
    inner = jax.tree.leaves(
      [e.params.get("jaxpr") for e in traced.eqns],
      is_leaf=lambda x: hasattr(x, "eqns"),
    )
    equations = [*traced.eqns, *(e for j in inner if j for e in j.eqns)]
    return max(v.aval.size for e in equations for v in e.outvars)

  assert largest(1024) == 2 * largest(512)
