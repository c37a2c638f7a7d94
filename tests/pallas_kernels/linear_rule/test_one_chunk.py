"""The functions on one chunk: decays, solve, dead tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels.linear_rule import LinearRuleOutput, one_chunk
from pallas_kernels.linear_rule.one_chunk import Arithmetic
from tests.support.jit import fast_jit
from tests.support.kernels import arguments, random_inputs
from tests.support.trees import assert_close

pytestmark = pytest.mark.usefixtures("float64")

INVERSES = [
  functools.partial(
    one_chunk.unit_lower_inverse,
    arithmetic=Arithmetic(in_kernel=masks),
  )
  for masks in (False, True)
]


def chunk_rule(inputs, **options):
  tokens, rates, state = arguments(inputs)
  return one_chunk.chunk_rule(
    tokens, state, step_size=rates.step_size, erase=rates.erase, **options
  )


def _loop_over_live(inputs, live):
  """Token loop in numpy for one head that skips the dead tokens."""
  weight, momentum = np.array(inputs["weight"]), np.array(inputs["momentum"])
  outputs = []
  for t, alive in enumerate(live):
    if inputs["reset"][t]:
      weight, momentum = weight * 0, momentum * 0
    x, u, before = inputs["x"][t], inputs["u"][t], weight
    if alive:
      momentum = inputs["momentum_decay"][t] * momentum
      momentum = momentum - inputs["step_size"][t] * np.outer(u, x)
      weight = inputs["retention"][t] * weight + momentum
      weight = weight - inputs["erase"][t] * np.outer(before @ x, x)
    outputs.append(
      (before @ inputs["queries"][t], weight @ inputs["queries"][t])
    )
  pre, post = map(np.stack, zip(*outputs, strict=True))
  return dict(pre=pre, post=post), weight, momentum


@pytest.mark.parametrize("read", ["pre", "post"])
def test_chunk_rule_dead_tokens_change_nothing(read):
  """Dead tokens in front, inside and at the end; also what they read."""
  inputs = random_inputs((3, 2, 12, 5, 3), resets=True)
  live = np.ones((3, 2, 12), bool)
  live[0, :, :4] = live[1, :, 9:] = live[2, :, [0, 5, 6, 11]] = False
  inputs["reset"] &= live  # a dead token may reset too, but not here

  @fast_jit
  def run(inputs, live):
    decays = one_chunk.chunk_decays(
      inputs["retention"],
      inputs["momentum_decay"],
      live=live,
      reset=inputs["reset"],
      read=read,
    )
    return chunk_rule(inputs, decays=decays, read=read)

  got = run(inputs, jnp.asarray(live))
  for index in np.ndindex(3, 2):
    one = {name: np.asarray(value[index]) for name, value in inputs.items()}
    outputs, weight, momentum = _loop_over_live(one, live[index])
    want = LinearRuleOutput(outputs[read], weight, momentum)
    assert_close(jax.tree.map(lambda v: v[index], got), want, 1e-12)  # noqa: B023


def test_chunk_rule_shares_decays_along_an_axis_of_one():
  """Several maps with the same gates: [M, B, C] against gates of [1, B, C]."""
  inputs = random_inputs((3, 2, 8, 5, 3))
  scalars = {"retention", "momentum_decay", "step_size", "erase"}
  shared = inputs | {name: inputs[name][:1] for name in scalars}
  repeated = inputs | {
    name: jnp.repeat(inputs[name][:1], 3, axis=0) for name in scalars
  }

  @fast_jit
  def run(inputs):
    decays = one_chunk.chunk_decays(
      inputs["retention"], inputs["momentum_decay"]
    )
    return chunk_rule(inputs, decays=decays)

  assert_close(run(shared), run(repeated), 1e-13)


def test_chunk_decays_equal_products():
  """Every field against products over tokens; zeros, resets, dead tokens."""
  rng = np.random.default_rng(0)
  c = 9
  alpha, beta = rng.uniform(0.5, 1.2, size=(2, 3, c))
  alpha[0, [2, 6]] = beta[0, [3, 6]] = 0
  reset, live = np.zeros((3, c), bool), np.ones((3, c), bool)
  reset[1, [0, 4]] = reset[2, 5] = True
  live[2, [0, 1, 7]] = False
  got = fast_jit(
    lambda alpha, beta, live, reset: one_chunk.chunk_decays(
      alpha, beta, live=live, reset=reset, read="post"
    )
  )(*map(jnp.asarray, (alpha, beta, live, reset)))
  got = jax.tree.map(np.asarray, got)
  for n in range(3):
    gates = [np.where(live[n], gate[n], 1) for gate in (alpha, beta)]
    # State before token i, scaled by what happens in i..t: [t, i].
    pair, start = [], []
    for gate in gates:
      start.append(
        [np.prod(gate[: t + 1]) * ~reset[n, : t + 1].any() for t in range(c)]
      )
      pair.append(np.zeros((c, c)))
      for t, i in zip(*np.tril_indices(c), strict=True):
        kept = ~reset[n, i + 1 : t + 1].any() & live[n, i]
        pair[-1][t, i] = np.prod(gate[i + 1 : t + 1]) * kept
    pair_momentum = pair[0] @ pair[1]
    start_momentum = pair[0] @ start[1]

    def previous(rows, first=0.0, reset=reset[n]):
      rows = np.concatenate([np.full_like(rows[:1], first), rows[:-1]])
      rows[reset] = 0
      return rows

    mix = (pair[0], np.array(start[0]), pair_momentum, start_momentum)
    before = map(previous, mix, (0.0, 1.0, 0.0, 0.0))
    want = one_chunk.ChunkDecays(
      before=one_chunk.Mix(*before),
      after=one_chunk.Mix(*mix),
      end=one_chunk.Mix(mix[0][-1], mix[1][-1:], mix[2][-1], mix[3][-1:]),
      momentum_pair_end=pair[1][-1],
      momentum_start_end=np.array(start[1][-1:]),
    )
    assert_close(jax.tree.map(lambda v: v[n], got), want, 1e-13)  # noqa: B023


def _between(factors):
  """prod_{i<r<t} f_r for i < t, and its derivative in every factor."""
  size = len(factors)
  products, slopes = np.zeros((size, size)), np.zeros((size, size, size))
  for t, i in zip(*np.tril_indices(size, -1), strict=True):
    products[t, i] = np.prod(factors[i + 1 : t])
    for r in range(i + 1, t):
      rest = np.prod(factors[i + 1 : r]) * np.prod(factors[r + 1 : t])
      slopes[t, i, r] = rest
  return products, slopes


@pytest.mark.parametrize("in_kernel", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, 16, 33])
def test_products_between_keep_all_digits(size, in_kernel):
  """Every single product and derivative, for factors of any size, signed."""
  rng = np.random.default_rng(size)
  factors = 10.0 ** -rng.uniform(0, 30, size) * rng.choice([-1, 1], size)
  usual = rng.uniform(size=size) < 0.5
  factors[usual] = rng.uniform(0.5, 1.1, usual.sum())
  factors[rng.uniform(size=size) < 0.1] = 0
  factors = factors.astype(np.float32).astype(np.float64)
  function = functools.partial(
    one_chunk.products_between,
    arithmetic=Arithmetic(in_kernel=in_kernel),
  )
  both = fast_jit(lambda x: (function(x), jax.jacrev(function)(x)))
  wanted = _between(factors)
  for dtype, tolerance in ((jnp.float32, 3e-6), (jnp.float64, 1e-14)):
    for got, want in zip(both(factors.astype(dtype)), wanted, strict=True):
      smallest = float(jnp.finfo(dtype).tiny)
      np.testing.assert_allclose(got, want, rtol=tolerance, atol=smallest)


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("size", [1, 2, 7, 16, 33, 64])
def test_unit_lower_inverse_equals_numpy(size, inverse):
  rng = np.random.default_rng(size)
  full = rng.normal(size=(2, 3, size, size)) / size**0.5
  got = fast_jit(inverse)(jnp.asarray(full))
  # The upper triangle of the argument is ignored.
  want = np.linalg.inv(np.eye(size) + np.tril(full, -1))
  np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("size", [4, 40])
def test_unit_lower_inverse_gradient(size, inverse):
  rng = np.random.default_rng(size)
  full = jnp.asarray(rng.normal(size=(2, size, size)) / size**0.5)
  cotangent = jnp.asarray(rng.normal(size=(2, size, size)))

  def numpy_style(full):
    eye = jnp.broadcast_to(jnp.eye(size), full.shape)
    return jnp.linalg.inv(eye + jnp.tril(full, -1))

  def gradient(inverse):
    return fast_jit(lambda full, g: jax.vjp(inverse, full)[1](g))(
      full, cotangent
    )

  got, want = gradient(inverse), gradient(numpy_style)
  assert_close(got, want, 1e-12)


def test_unit_lower_inverse_forward_mode_and_second_order():
  full = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)))
  check_grads(jax.jit(one_chunk.unit_lower_inverse), (full,), order=2)
