"""The kernels of `linear_rule` in interpret mode = token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_rule import pallas_gpu, pallas_tpu, tuning
from tests.pallas_kernels.testing import (
  assert_close,
  call,
  fast_jit,
  random_inputs,
)

KERNELS = {
  "pallas_tpu": pallas_tpu.linear_rule_tpu,
  "pallas_gpu": pallas_gpu.linear_rule_gpu,
}
both = pytest.mark.parametrize("kernel", KERNELS)


def _reference(x, u, **inputs):
  return call(
    {"x": x, "u": u, **inputs}, chunk_length=1, implementation="reference"
  )


def _kernel(name, chunk_length, interpret=True):
  return functools.partial(
    KERNELS[name], chunk_length=chunk_length, interpret=interpret
  )


def _values_and_vjp(function, inputs, *, read="pre"):
  """Outputs, final state and the gradients to all float arguments."""
  inputs = dict(inputs)
  reset = inputs.pop("reset")

  def run(inputs):
    inputs = dict(inputs)
    x, u = inputs.pop("x"), inputs.pop("u")
    return function(x, u, **inputs, reset=reset, read=read)

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


def _check(kernel, inputs, chunk_length, *, read="pre", tolerance=2e-5):
  got = _values_and_vjp(_kernel(kernel, chunk_length), inputs, read=read)
  want = _values_and_vjp(_reference, inputs, read=read)
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


@pytest.mark.parametrize("kernel, read, momentum, erase", _OPTIONS)
def test_kernels_equal_reference_values_and_vjps(kernel, read, momentum, erase):
  """Every option; zeros and resets; 70 tokens are not whole chunks of 16."""
  inputs = random_inputs(
    (1, 2, 70, 16, 32),
    momentum=momentum,
    erase=erase,
    zeros=True,
    resets=True,
    dtype=np.float32,
  )
  _check(kernel, inputs, 16, read=read)


@both
def test_kernels_without_queries(kernel):
  inputs = random_inputs((1, 2, 40, 16, 16), dtype=np.float32)
  _check(kernel, inputs | {"queries": None}, 16)


# (T, C, K, E): several chunks per step, several steps; few tokens; sizes.
_SIZES = [(300, 16, 64, 64), (7, 16, 16, 32), (33, 32, 32, 16)]
_LARGE = [(520, 256, 32, 32), (130, 64, 256, 64), (70, 32, 128, 128)]


@both
@pytest.mark.parametrize(
  "sizes", _SIZES + [pytest.param(s, marks=pytest.mark.slow) for s in _LARGE]
)
def test_kernels_equal_reference_at_other_sizes(kernel, sizes):
  tokens, chunk_length, key_dim, value_dim = sizes
  inputs = random_inputs((2, 1, tokens, key_dim, value_dim), dtype=np.float32)
  _check(kernel, inputs, chunk_length, tolerance=1e-4)


def test_tpu_kernel_at_odd_sizes():
  inputs = random_inputs((1, 2, 50, 5, 3), dtype=np.float32, resets=True)
  _check("pallas_tpu", inputs, 12)


@both
def test_kernels_in_bfloat16_against_float32(kernel):
  """Activations in bfloat16, state and gates in float32."""
  inputs = random_inputs((1, 2, 40, 32, 16), dtype=np.float32)
  low = inputs | {
    name: inputs[name].astype(jnp.bfloat16) for name in ("x", "u", "queries")
  }
  exact = inputs | {
    name: low[name].astype(jnp.float32) for name in ("x", "u", "queries")
  }
  got = _values_and_vjp(_kernel(kernel, 16), low)
  want = _values_and_vjp(_reference, exact)
  for tree in (got[0], {k: got[1][k] for k in ("x", "u", "queries")}):
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} >= {
      jnp.dtype(jnp.bfloat16)
    }
  assert_close(got, want, 2e-2)


@both
def test_kernels_under_scan_and_remat(kernel):
  """As layers run them: `jax.lax.scan` over `jax.checkpoint`."""
  inputs = random_inputs((1, 2, 32, 16, 16), dtype=np.float32, erase=False)

  def loss(inputs, function):
    rest = {k: v for k, v in inputs.items() if k not in ("x", "u")}

    @jax.checkpoint
    def layer(u, _):
      return function(inputs["x"], u, **rest).outputs, None

    u, _ = jax.lax.scan(layer, inputs["u"], None, length=2)
    return jnp.sum(jnp.square(u))

  def gradient(function):
    run = functools.partial(loss, function=function)
    return fast_jit(jax.value_and_grad(run))(
      {k: v for k, v in inputs.items() if v is not None}
    )

  inputs["erase"] = None
  function = functools.partial(_kernel(kernel, 16), erase=None)
  reference = functools.partial(_reference, erase=None)
  assert_close(gradient(function), gradient(reference), 1e-4)


def test_tpu_kernel_has_no_races():
  """On the simulator of a TPU's memories, which are NaN where unwritten."""
  inputs = random_inputs((1, 2, 40, 8, 8), dtype=np.float32)
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  got = _values_and_vjp(_kernel("pallas_tpu", 8, params), inputs)
  assert_close(got, _values_and_vjp(_reference, inputs), 2e-5)
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("kernel", KERNELS)
def test_explicit_kernels_raise_where_they_cannot_run(kernel):
  inputs = random_inputs((1, 1, 32, 16, 16), dtype=np.float32)
  with pytest.raises(Exception, match="(?i)interpret mode"):
    call(inputs, chunk_length=16, implementation=kernel)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_refuse_float64(kernel):
  with pytest.raises(NotImplementedError, match='float64: use "chunked"'):
    call(
      random_inputs((1, 1, 32, 16, 16)), chunk_length=16, implementation=kernel
    )


def test_gpu_kernel_refuses_what_it_cannot_tile():
  inputs = random_inputs((1, 1, 32, 24, 16), dtype=np.float32)
  with pytest.raises(NotImplementedError, match="powers of 2.*chunked"):
    call(inputs, chunk_length=16, implementation="pallas_gpu")


def test_gpu_blocks_cover_all_tokens():
  for tokens in (1, 7, 64, 65, 1000, 4096, 100_003):
    for chunk_length in (1, 16, 64, 256):
      found = tuning.gpu_blocks(
        tokens, chunk_length, key_dim=128, value_dim=64, has_momentum=True
      )
      assert found.chunk_length <= max(16, chunk_length)
      group = found.chunk_length * found.chunks
      assert tokens <= found.num_tokens < tokens + group


def test_block_sizes_validate():
  with pytest.raises(ValueError, match="at least 1"):
    tuning.BlockSizes(16, 0, 1)
