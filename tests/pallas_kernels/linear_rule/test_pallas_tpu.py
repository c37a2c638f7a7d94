"""The TPU kernel of `linear_rule` by itself, in interpret mode."""

import numpy as np
from jax.experimental.pallas import tpu as pltpu

from tests.pallas_kernels.linear_rule.test_pallas_common import (
  check,
  kernel,
  reference,
  values_and_vjp,
)
from tests.support.kernels import random_inputs
from tests.support.trees import assert_close


def test_tpu_kernel_at_odd_sizes():
  inputs = random_inputs((1, 2, 50, 5, 3), dtype=np.float32, resets=True)
  check("pallas_tpu", inputs, 12)


def test_tpu_kernel_has_no_races():
  """On the simulator of a TPU's memories, which are NaN where unwritten."""
  inputs = random_inputs((1, 2, 40, 8, 8), dtype=np.float32)
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  got = values_and_vjp(kernel("pallas_tpu", 8, params), inputs)
  assert_close(got, values_and_vjp(reference, inputs), 2e-5)
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  assert not interpret_pallas_call.races.races_found
