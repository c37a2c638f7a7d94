"""Both kernels of `linear_rule` in interpret mode = token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_rule import pallas_gpu, pallas_tpu
from tests.support.jit import fast_jit
from tests.support.kernels import arguments, call, random_inputs
from tests.support.trees import assert_close

KERNELS = {
  "pallas_tpu": pallas_tpu.linear_rule_tpu,
  "pallas_gpu": pallas_gpu.linear_rule_gpu,
}
both = pytest.mark.parametrize("name", KERNELS)


def reference(inputs, read="pre"):
  return call(inputs, read=read, chunk_length=1, implementation="reference")


def kernel(name, chunk_length, interpret=True):
  """(inputs, read) -> outputs and the last state."""
  how = dict(chunk_length=chunk_length, interpret=interpret)
  return lambda inputs, read="pre": KERNELS[name](
    *arguments(inputs), read=read, **how
  )


def values_and_vjp(function, inputs, *, read="pre"):
  """Outputs, final state and the gradients to all float arguments."""
  inputs = dict(inputs)
  reset = inputs.pop("reset")

  def run(inputs):
    return function(inputs | {"reset": reset}, read)

  @fast_jit
  def both(inputs, cotangents):
    out, vjp = jax.vjp(run, inputs)
    return out, vjp(cotangents)[0]

  shapes = jax.eval_shape(run, inputs)
  rng = np.random.default_rng(1)
  cotangents = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes
  )
  return both(inputs, cotangents)


def check(name, inputs, chunk_length, *, read="pre", tolerance=2e-5):
  got = values_and_vjp(kernel(name, chunk_length), inputs, read=read)
  want = values_and_vjp(reference, inputs, read=read)
  assert_close(got, want, tolerance)


# Both kernels run the same function per chunk: the GPU's needs fewer pairs.
_OPTIONS = [
  ("pallas_tpu", read, momentum, erase)
  for read in ("pre", "post")
  for momentum in (True, False)
  for erase in (True, False)
] + [
  ("pallas_gpu", "pre", True, True),
  ("pallas_gpu", "post", True, False),
  ("pallas_gpu", "pre", False, False),
  ("pallas_gpu", "post", False, True),
]


@pytest.mark.parametrize("name, read, momentum, erase", _OPTIONS)
def test_kernels_equal_reference_values_and_vjps(name, read, momentum, erase):
  """Every option; zeros and resets; 70 tokens are not whole chunks of 16."""
  inputs = random_inputs(
    (1, 2, 70, 16, 32),
    momentum=momentum,
    erase=erase,
    zeros=True,
    resets=True,
    dtype=np.float32,
  )
  check(name, inputs, 16, read=read)


@both
def test_kernels_without_queries(name):
  inputs = random_inputs((1, 2, 40, 16, 16), dtype=np.float32)
  check(name, inputs | {"queries": None}, 16)


# (T, C, K, E): several chunks per step, several steps; few tokens; sizes.
_SIZES = [(300, 16, 64, 64), (7, 16, 16, 32), (33, 32, 32, 16)]
_LARGE = [(520, 256, 32, 32), (130, 64, 256, 64), (70, 32, 128, 128)]


@both
@pytest.mark.parametrize(
  "sizes", _SIZES + [pytest.param(s, marks=pytest.mark.slow) for s in _LARGE]
)
def test_kernels_equal_reference_at_other_sizes(name, sizes):
  tokens, chunk_length, key_dim, value_dim = sizes
  inputs = random_inputs((2, 1, tokens, key_dim, value_dim), dtype=np.float32)
  check(name, inputs, chunk_length, tolerance=1e-4)


@both
def test_kernels_in_bfloat16_against_float32(name):
  """Activations in bfloat16, state and gates in float32."""
  inputs = random_inputs((1, 2, 40, 32, 16), dtype=np.float32)
  low = inputs | {
    name: inputs[name].astype(jnp.bfloat16) for name in ("x", "u", "queries")
  }
  exact = inputs | {
    name: low[name].astype(jnp.float32) for name in ("x", "u", "queries")
  }
  got = values_and_vjp(kernel(name, 16), low)
  want = values_and_vjp(reference, exact)
  for tree in (got[0], {k: got[1][k] for k in ("x", "u", "queries")}):
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} >= {
      jnp.dtype(jnp.bfloat16)
    }
  assert_close(got, want, 2e-2)


@both
def test_kernels_under_scan_and_remat(name):
  """As layers run them: `jax.lax.scan` over `jax.checkpoint`."""
  inputs = random_inputs((1, 2, 32, 16, 16), dtype=np.float32, erase=False)

  def loss(inputs, function):
    @jax.checkpoint
    def layer(u, _):
      return function(inputs | {"u": u}).outputs, None

    u, _ = jax.lax.scan(layer, inputs["u"], None, length=2)
    return jnp.sum(jnp.square(u))

  def gradient(function):
    inner = functools.partial(loss, function=function)
    return fast_jit(jax.value_and_grad(inner))(inputs)

  assert_close(gradient(kernel(name, 16)), gradient(reference), 1e-4)
