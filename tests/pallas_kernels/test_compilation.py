"""The kernels compile for TPUs and GPUs, within their memory."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.linear_rule import linear_rule
from tests.support import compilers

pytestmark = pytest.mark.optimized  # as users compile


def _arguments(tokens, heads, key_dim, value_dim, *, momentum=True):
  """Shapes of `linear_rule`'s arguments; activations in bfloat16."""
  shape = 1, heads, tokens

  def array(*axes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(axes, dtype)

  state = array(1, heads, value_dim, key_dim)
  return dict(
    x=array(*shape, key_dim, dtype=jnp.bfloat16),
    u=array(*shape, value_dim, dtype=jnp.bfloat16),
    queries=array(*shape, key_dim, dtype=jnp.bfloat16),
    weight=state,
    momentum=state if momentum else None,
    retention=array(*shape),
    momentum_decay=array(*shape) if momentum else None,
    step_size=array(*shape),
    erase=array(*shape),
  )


def _with_vjp(**options):
  """(values, gradients) of `linear_rule`, whose documents reset the state."""

  def run(inputs, reset):
    def values(inputs):
      inputs = dict(inputs)
      x, u = inputs.pop("x"), inputs.pop("u")
      return linear_rule(x, u, **inputs, reset=reset, **options)

    out, vjp = jax.vjp(values, inputs)
    return out, vjp(out)

  return run


def _compile(device, tokens, heads, key_dim, value_dim, **options):
  arguments = _arguments(tokens, heads, key_dim, value_dim)
  reset = jax.ShapeDtypeStruct((1, heads, tokens), jnp.bool_)
  return compilers.compile_for(device, _with_vjp(**options), arguments, reset)


slow = pytest.mark.slow
TPUS = ["v5e:2x2", "v5:2x2x1", "v6e:2x2"]
SHAPES = [
  (4096, 8, 128, 128, 64),  # 340M
  pytest.param((4096, 16, 128, 128, 256), marks=slow),  # 1.3B, long chunks
  pytest.param((4096, 4, 256, 256, 256), marks=slow),
  pytest.param((1000, 4, 32, 64, 16), marks=slow),
]


@pytest.mark.parametrize("topology", TPUS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_rule_compiles_for_tpus(topology, shape):
  *shape, chunk_length = shape
  compiled = _compile(
    compilers.tpu(topology)[0],
    *shape,
    chunk_length=chunk_length,
    read="post",
    implementation="pallas_tpu",
  )
  calls = compiled.as_text().count('custom_call_target="tpu_custom_call"')
  assert calls == 2  # forward and backward


def test_xla_has_no_kernel():
  compiled = _compile(
    compilers.tpu("v5e:2x2")[0],
    *(256, 2, 128, 128),
    chunk_length=64,
    implementation="xla",
  )
  assert "tpu_custom_call" not in compiled.as_text()


@slow
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (256, 128)])
def test_linear_rule_compiles_for_an_h200(sizes):
  compiled = _compile(
    compilers.h200(),
    *(4096, 8, *sizes),
    chunk_length=64,
    implementation="pallas_gpu",
  )
  assert compiled.as_text().count("triton") >= 2
