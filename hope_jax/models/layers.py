"""Slow layers that every block shares: projection, norm, convolution, FFN.

Slow weights are Linen parameters with logical axis names (`training/
sharding.py` maps them to mesh axes).  Parameters are float32, activations
have the model's dtype.  All linear maps are without bias; how they begin is the
config's `initializer`.

Legend: B batch, T tokens, D model, F hidden, W window.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from hope_jax.config import ModelConfig
from hope_jax.memory import products

INIT_STD = 0.02


def uniform(scale: float, fan: Literal["fan_in", "fan_avg"] = "fan_in") -> Any:
  """U(-b, b) with b^2 = 3 scale / (inputs, or mean of inputs and outputs)."""
  return nn.initializers.variance_scaling(scale, fan, "uniform")


def initializer(config: ModelConfig, *, is_output: bool) -> Any:
  """The start of a linear map from n inputs, D model width, L blocks.

  `is_output`: it ends on the residual stream, to which a block adds r times.

    config   inner map          output map
    normal   N(0, 0.02)         N(0, 0.02) / sqrt(2 L)       GPT-2; spec 02
    uniform  U(+-1 / sqrt(n))   U(+-1 / sqrt(n)) / sqrt(r L)  Mamba's code
    small    N(0, sqrt(0.4/D))  N(0, 1 / (L sqrt(D)))         GPT-NeoX's code
  """
  width, blocks = config.width, config.num_layers
  if config.initializer == "small":
    std = 1 / (blocks * width**0.5) if is_output else (0.4 / width) ** 0.5
    return nn.initializers.normal(std)
  if config.initializer == "uniform":
    additions = blocks * (2 if config.ffn_hidden else 1)
    return uniform(1 / (3 * additions) if is_output else 1 / 3)
  std = INIT_STD / (2 * blocks) ** 0.5 if is_output else INIT_STD
  return nn.initializers.normal(std)


def _dot_general(
  x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: None
) -> jax.Array:
  """The product of `nn.Dense`, which is x W."""
  assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
  assert precision is None
  return products.matmul(x, kernel)


def dense(
  features: int,
  config: ModelConfig,
  axes: tuple[str | None, str | None],
  name: str,
  *,
  is_output: bool = False,
  kernel_init: Any = None,
) -> nn.Dense:
  """A linear map without bias; `axes` are its kernel's logical axes.

  `kernel_init`: a published start in place of the config's.
  """
  kernel_init = kernel_init or initializer(config, is_output=is_output)
  return nn.Dense(
    features,
    use_bias=False,
    dtype=jnp.dtype(config.dtype),
    kernel_init=nn.with_logical_partitioning(kernel_init, axes),
    dot_general=_dot_general,
    name=name,
  )


def rms_norm(config: ModelConfig, name: str) -> nn.RMSNorm:
  """x / rms(x) * scale, in float32."""
  return nn.RMSNorm(
    dtype=jnp.dtype(config.dtype),
    epsilon=config.norm_eps,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
    name=name,
  )


def norm(config: ModelConfig, name: str) -> nn.Module:
  """The norm of the residual stream: RMS, in RWKV-7 LayerNorm with a bias."""
  if not config.is_rwkv7:
    return rms_norm(config, name)
  make = nn.with_logical_partitioning
  return nn.LayerNorm(
    dtype=jnp.dtype(config.dtype),
    epsilon=1e-5,
    scale_init=make(nn.initializers.ones, ("norm",)),
    bias_init=make(nn.initializers.zeros, ("norm",)),
    name=name,
  )


class ShortConv(nn.Module):
  """Causal depthwise convolution: y_t = sum_j kernel_j x_{t-j} (+ bias).

  Both begin uniform in +-1 / sqrt(window), as PyTorch's; with `is_normal` as
  Flax's, from a (cut) normal distribution of variance 1 / window and from 0.
  The state is the last window - 1 inputs, [B, W-1, D], of the last document.
  Taps that reach across a segment border read zero; the state's inputs belong
  to segment 0.
  """

  window: int
  dtype: Any
  use_bias: bool = False
  is_normal: bool = False

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: jax.Array | None = None,
    segments: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    batch, length, width = x_BTD.shape
    bound = self.window**-0.5
    init: Any = lambda key, shape: jax.random.uniform(
      key, shape, minval=-bound, maxval=bound
    )
    of_bias = init
    if self.is_normal:
      init, of_bias = nn.initializers.lecun_normal(), nn.initializers.zeros
    box = nn.with_logical_partitioning(init, ("window", "heads"))
    kernel: Any = self.param("kernel", box, (self.window, width))
    kernel_WD = kernel.astype(self.dtype)
    if state is None:
      state = jnp.zeros((batch, self.window - 1, width), x_BTD.dtype)
    padded = jnp.concatenate([state.astype(x_BTD.dtype), x_BTD], axis=1)
    number = None
    if segments is not None:
      number = jnp.pad(segments, ((0, 0), (self.window - 1, 0)))
    y_BTD = x_BTD * kernel_WD[0][None, None]
    for back in range(1, self.window):
      start = self.window - 1 - back
      tap_BTD = jax.lax.dynamic_slice_in_dim(padded, start, length, axis=1)
      if number is not None:
        same = segments == number[:, start : start + length]
        tap_BTD = jnp.where(same[:, :, None], tap_BTD, 0)
      y_BTD = y_BTD + tap_BTD * kernel_WD[back][None, None]
    if self.use_bias:
      box = nn.with_logical_partitioning(of_bias, ("heads",))
      bias: Any = self.param("bias", box, (width,))
      y_BTD = y_BTD + bias.astype(self.dtype)[None, None]
    last = padded[:, length:]
    if number is not None:
      same = number[:, length:] == number[:, -1:]
      last = jnp.where(same[:, :, None], last, 0)
    return y_BTD, last


def full_widths(config: ModelConfig) -> dict[str, int]:
  """Query, key and value of the model's width."""
  return dict.fromkeys(("query", "key", "value"), config.width)


def projections(
  x_BTD: jax.Array,
  widths: Mapping[str, int],
  config: ModelConfig,
  state: Mapping[str, jax.Array] | None,
  segments: jax.Array | None,
  *,
  use_bias: bool = False,
  kernel_init: Any = None,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """A linear map to each width, then a causal convolution where configured.

  Returns the projections [B, T, width] and the convolutions' new states.
  """
  projected, new_state = {}, {}
  for name, width in widths.items():
    axes = "embed", "heads"
    p = dense(width, config, axes, name, kernel_init=kernel_init)(x_BTD)
    if config.conv_window:
      p, new_state[name] = ShortConv(
        config.conv_window, p.dtype, use_bias, name=f"conv_{name}"
      )(p, state[name] if state else None, segments)
    projected[name] = p
  return projected, new_state


def init_conv_state(
  config: ModelConfig, batch_size: int, widths: Mapping[str, int]
) -> dict[str, jax.Array]:
  """The last window - 1 inputs of each projection's convolution, zeros."""
  if not config.conv_window:
    return {}
  dtype, past = jnp.dtype(config.dtype), config.conv_window - 1
  return {
    name: jnp.zeros((batch_size, past, width), dtype)
    for name, width in widths.items()
  }


def split_heads(x_BTD: jax.Array, heads: int) -> jax.Array:
  """[B, T, H K] -> [B, H, T, K] in float32."""
  batch, length, width = x_BTD.shape
  x = x_BTD.reshape(batch, length, heads, width // heads)
  return x.swapaxes(1, 2).astype(jnp.float32)


def merge_heads(x_BHTK: jax.Array) -> jax.Array:
  """[B, H, T, K] -> [B, T, H K]: heads side by side."""
  x = x_BHTK.swapaxes(1, 2)
  return x.reshape(*x.shape[:2], -1)


def silu_gate(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) * up, SwiGLU's hidden activation."""
  return nn.silu(gate) * up


class SwiGLU(nn.Module):
  """W_down (silu(W_gate x) * W_up x)."""

  config: ModelConfig
  hidden: int

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    make = functools.partial(dense, config=self.config)
    gate = make(self.hidden, axes=("embed", "mlp"), name="gate")(x_BTD)
    up = make(self.hidden, axes=("embed", "mlp"), name="up")(x_BTD)
    hidden = nn.with_logical_constraint(
      silu_gate(gate, up), ("batch", "length", "mlp")
    )
    return make(
      self.config.width, axes=("mlp", "embed"), name="down", is_output=True
    )(hidden)


def wants_dynamics(module: nn.Module) -> bool:
  """Whether `dynamics` is asked for: not by `init`, to which all is mutable."""
  return (
    module.is_mutable_collection("dynamics") and not module.is_initializing()
  )


def sow_dynamics(module: nn.Module, name: str, values: dict | None):
  """Records scalars of an inner learning where `dynamics` is asked for."""
  for key, value in (values or {}).items():
    module.sow("dynamics", f"{name}.{key}", value)
