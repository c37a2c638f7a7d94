"""The linear layers in the kernels (interpret mode) = in XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.config import MemoryConfig, ModelConfig
from hope_jax.models import linear
from tests.support.jit import fast_jit
from tests.support.kernels import random_inputs
from tests.support.trees import assert_close


@pytest.mark.parametrize("layer", ["gated_deltanet", "mamba2"])
def test_kernels_equal_xla_values_and_vjps(layer):
  inputs = random_inputs((1, 2, 22, 16, 16), momentum=False, dtype=np.float32)
  names = "x", "u", "queries", "retention", "step_size", "erase", "weight"
  arrays = [inputs[name] for name in names]

  def make(implementation):
    memory = MemoryConfig(implementation=implementation, chunk_length=8)
    config = ModelConfig(sequence_layer=layer, memory=memory)

    def run(k, v, q, retention, step_size, erase, weight):
      erase = None if layer == "mamba2" else erase
      rule = linear.Rule(retention, step_size, erase)
      before = linear.Matrix(weight, jnp.zeros((), jnp.int32))
      o, after = linear.run_rule(
        linear.Tokens(k, v, q, rule), before, None, config
      )
      return o, after.weight

    def values_and_vjp(*arrays):
      out, vjp = jax.vjp(run, *arrays)
      return out, vjp(jax.tree.map(jnp.cos, out))

    return values_and_vjp

  kernels, xla = make("pallas_interpret"), make("xla")
  assert "pallas_call" in str(jax.make_jaxpr(kernels)(*arrays))
  assert "pallas_call" not in str(jax.make_jaxpr(xla)(*arrays))
  assert_close(fast_jit(kernels)(*arrays), fast_jit(xla)(*arrays), 2e-5)
