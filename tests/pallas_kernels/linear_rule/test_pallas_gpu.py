"""What the GPU kernel of `linear_rule` cannot do."""

import numpy as np
import pytest

from tests.support.kernels import call, random_inputs


def test_gpu_kernel_refuses_what_it_cannot_tile():
  inputs = random_inputs((1, 1, 32, 24, 16), dtype=np.float32)
  with pytest.raises(NotImplementedError, match="powers of 2.*xla"):
    call(inputs, chunk_length=16, implementation="pallas_gpu")
