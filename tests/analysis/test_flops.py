import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.analysis import flops

A = jnp.ones((4, 5))
B = jnp.ones((5, 6))
PRODUCT = 2 * 4 * 5 * 6
SQUARE = jnp.ones((3, 3))


def scanned(x):
  return jax.lax.scan(lambda c, _: (c @ SQUARE, None), x, length=7)[0]


def nested(x):
  return jax.lax.scan(lambda c, _: (scanned(c), None), x, length=5)[0]


def dearest(x):
  return jax.lax.cond(
    x[0, 0] > 0, lambda x: x @ SQUARE @ SQUARE, lambda x: x @ SQUARE, x
  )


@jax.custom_vjp
def custom(x):
  return x @ SQUARE


custom.defvjp(lambda x: (x @ SQUARE, None), lambda _, g: (g @ SQUARE @ SQUARE,))


@pytest.mark.parametrize(
  ("function", "args", "want"),
  [
    (jnp.matmul, (A, B), PRODUCT),
    (jax.jit(jnp.matmul), (A, B), PRODUCT),
    (jnp.matmul, (jnp.ones((9, 4, 5)), jnp.ones((9, 5, 6))), 9 * PRODUCT),
    (lambda a, b: jnp.einsum("ij,jk->ki", a, b), (A, B), PRODUCT),
    (jax.checkpoint(jnp.matmul), (A, B), PRODUCT),
    (scanned, (SQUARE,), 7 * 54),
    (nested, (SQUARE,), 35 * 54),
    (dearest, (SQUARE,), 2 * 54),
    (custom, (SQUARE,), 54),
    (jax.grad(lambda x: custom(x).sum()), (SQUARE,), 3 * 54),
    (jnp.add, (A, A), 0),
  ],
)
def test_count_of_known_functions(function, args, want):
  assert flops.count(function, *args) == want


def test_count_of_convolutions():
  image, kernel = jnp.ones((2, 8, 10)), jnp.ones((12, 4, 3))

  def convolve(image, kernel):  # 2 groups
    return jax.lax.conv_general_dilated(
      image, kernel, (1,), "VALID", feature_group_count=2,
      dimension_numbers=("NCH", "OIH", "NCH"),
    )  # fmt: skip

  assert flops.count(convolve, image, kernel) == 2 * (2 * 12 * 8) * (4 * 3)


def test_count_takes_shapes():
  shape = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)
  assert flops.count(jnp.matmul, shape, shape) == 2.0**61


def test_per_token_of_a_transformer_by_hand(tiny):
  width, hidden, length, vocab = 16, 32, 32, 256
  block = 4 * width**2 + 3 * width * hidden + 2 * length * width
  forward = 2 * (2 * block + vocab * width)
  np.testing.assert_allclose(flops.per_token(tiny), 3 * forward, rtol=1e-6)


def test_per_token_leaves_recomputation_out(tiny):
  model = dataclasses.replace(tiny.model, remat="full")
  remat = dataclasses.replace(tiny, model=model)
  assert flops.per_token(remat) == flops.per_token(tiny)


@pytest.mark.parametrize(
  ("kind", "want"),
  [
    ("TPU v3", 61.5e12),  # two devices a chip
    ("TPU v4", 275e12),
    ("TPU v4 lite", 138e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU7x", 1153.5e12),  # two devices a chip
    ("TPU8i", None),
    ("NVIDIA A10", 125e12),
    ("NVIDIA A10G", None),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA A100-PCIE-40GB", 312e12),
    ("NVIDIA A100 80GB PCIe", 312e12),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ("NVIDIA A800-SXM4-80GB", 312e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA L40", 181e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA H20", 148e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H800", 989e12),
    ("NVIDIA H800 PCIe", 756e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA GH200 144G HBM3e", None),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA B300 SXM6 AC", 2250e12),
    ("NVIDIA GB200", 2500e12),
    ("NVIDIA GB300", 2500e12),
    ("NVIDIA GeForce RTX 4090", None),
    ("AMD Instinct MI300X", None),
  ],
)
def test_peak_flops_by_device_kind(kind, want):
  device = types.SimpleNamespace(device_kind=kind, platform="gpu")
  assert flops.peak_flops(device) == want
  line = flops.why_no_mfu(device)
  assert (line is None) == (want is not None)
  assert line is None or (f"of {kind!r} are not known" in line)


def test_peak_of_a_device_that_is_one_core_of_a_chip():
  device = types.SimpleNamespace(device_kind="TPU v4", num_cores=1)
  assert flops.peak_flops(device) == 137.5e12
  device.num_cores = 2
  assert flops.peak_flops(device) == 275e12
  device.device_kind = "TPU v6 lite"
  device.num_cores = 1
  assert flops.peak_flops(device) == 918e12


def test_nothing_is_said_of_a_cpu():
  (device, *_) = jax.devices("cpu")
  assert flops.peak_flops(device) is None and flops.why_no_mfu(device) is None
