"""Slow layers that every block shares: projection, norm, convolution, FFN.

Slow weights are Linen parameters with logical axis names (`training/
sharding.py` maps them to mesh axes).  Parameters are float32, activations
have the model's dtype.  Linear maps have no bias; the config's `initializer`
says how they start.

Legend: B batch, T tokens, D model, F hidden, W window.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer

from hope_jax.config import ModelConfig
from hope_jax.memory import products
from hope_jax.models.parameters import boxed, parameter
from hope_jax.optim.roles import Role

INIT_STD = 0.02


def uniform(
  scale: float, fan: Literal["fan_in", "fan_avg"] = "fan_in"
) -> Initializer:
  """U(-b, b) with b^2 = 3 scale / (inputs, or mean of inputs and outputs)."""
  return nn.initializers.variance_scaling(scale, fan, "uniform")


def initializer(config: ModelConfig, *, is_output: bool) -> Initializer:
  """The initializer of a linear map with n inputs, for model width D, L blocks.

  `is_output`: whether its output is added to the residual stream, to which each
  block adds r times.

    config   inner map          output map
    normal   N(0, 0.02)         N(0, 0.02) / sqrt(2 L)       GPT-2
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
  """The product x W, as `dot_general` of `nn.Dense`."""
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
  kernel_init: Initializer | None = None,
  role: Role = "weight",
  owner: tuple[str, ...] = (),
) -> nn.Dense:
  """A linear map without bias; `axes` are its kernel's logical axes.

  Args:
    is_output: whether its output is added to the residual stream, see
      `initializer`.
    kernel_init: a published initializer in place of the config's.
    role, owner: the kernel's, see `models/parameters.py`.
  """
  kernel_init = kernel_init or initializer(config, is_output=is_output)
  return nn.Dense(
    features,
    use_bias=False,
    dtype=jnp.dtype(config.dtype),
    kernel_init=boxed(kernel_init, axes, role, owner),
    dot_general=_dot_general,
    name=name,
  )


class Matrix(nn.Module):
  """A linear map of the model's width that also returns its matrix: x W, W."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    width, dtype = self.config.width, jnp.dtype(self.config.dtype)
    init = initializer(self.config, is_output=False)
    axes = "embed", "heads"
    weight = parameter(self, "kernel", init, (width, width), axes)
    return products.matmul(x_BTD.astype(dtype), weight.astype(dtype)), weight


def rms_norm(
  config: ModelConfig, name: str, owner: tuple[str, ...] = ()
) -> nn.RMSNorm:
  """x / rms(x) * scale, in float32."""
  return nn.RMSNorm(
    dtype=jnp.dtype(config.dtype),
    epsilon=config.norm_eps,
    scale_init=boxed(nn.initializers.ones, ("norm",), "norm", owner),
    name=name,
  )


def residual(x_BTD: jax.Array) -> jax.Array:
  """The residual stream, with its layout between blocks on the mesh."""
  return nn.with_logical_constraint(x_BTD, ("batch", "length", "act"))


def document_starts(documents: jax.Array) -> jax.Array:
  """Whether a token is the first of a document: numbers [B, T] -> bool.

  Document 0 is the one that a given state belongs to.
  """
  before = jnp.pad(documents[:, :-1], ((0, 0), (1, 0)))
  return documents != before


def step_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Initial a of Mamba, with softplus(a) log-uniform in 0.001 .. 0.1."""
  low, high = jnp.log(1e-3), jnp.log(0.1)
  step = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
  return step + jnp.log(-jnp.expm1(-step))


class ShortConv(nn.Module):
  """Causal depthwise convolution: y_t = sum_j kernel_j x_{t-j} (+ bias).

  Kernel and bias start uniform in +-1 / sqrt(window), as in PyTorch.  With
  `is_normal` they start as in Flax: the kernel from a truncated normal
  distribution of variance 1 / window, the bias at 0.  The state is the last
  window - 1 inputs, [B, W-1, D], with zeros for those of earlier documents.
  Taps that reach across a document's border read zero; the state's inputs
  belong to document 0.
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
    documents: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    batch, length, width = x_BTD.shape
    bound = self.window**-0.5
    init: Initializer = lambda key, shape: jax.random.uniform(
      key, shape, minval=-bound, maxval=bound
    )
    of_bias = init
    if self.is_normal:
      init, of_bias = nn.initializers.lecun_normal(), nn.initializers.zeros
    kernel_WD = parameter(
      self,
      "kernel",
      init,
      (self.window, width),
      ("window", "heads"),
      role="conv",
    ).astype(self.dtype)
    if state is None:
      state = jnp.zeros((batch, self.window - 1, width), x_BTD.dtype)
    padded = jnp.concatenate([state.astype(x_BTD.dtype), x_BTD], axis=1)
    number = None
    if documents is not None:
      number = jnp.pad(documents, ((0, 0), (self.window - 1, 0)))
    y_BTD = x_BTD * kernel_WD[0][None, None]
    for back in range(1, self.window):
      start = self.window - 1 - back
      tap_BTD = jax.lax.dynamic_slice_in_dim(padded, start, length, axis=1)
      if number is not None:
        same = documents == number[:, start : start + length]
        tap_BTD = jnp.where(same[:, :, None], tap_BTD, 0)
      y_BTD = y_BTD + tap_BTD * kernel_WD[back][None, None]
    if self.use_bias:
      bias = parameter(self, "bias", of_bias, (width,), ("heads",), role="conv")
      y_BTD = y_BTD + bias.astype(self.dtype)[None, None]
    last = padded[:, length:]
    if number is not None:
      same = number[:, length:] == number[:, -1:]
      last = jnp.where(same[:, :, None], last, 0)
    return y_BTD, last


def full_widths(config: ModelConfig) -> dict[str, int]:
  """Query, key and value, all with the model's width."""
  return dict.fromkeys(("query", "key", "value"), config.width)


def projections(
  x_BTD: jax.Array,
  widths: Mapping[str, int],
  config: ModelConfig,
  state: Mapping[str, jax.Array] | None,
  documents: jax.Array | None,
  *,
  use_bias: bool = False,
  kernel_init: Initializer | None = None,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """A linear map to each width, then a causal convolution where configured.

  Returns the projections [B, T, width] and the convolutions' new states.
  """
  axes = "embed", "heads"
  projected = {
    name: dense(width, config, axes, name, kernel_init=kernel_init)(x_BTD)
    for name, width in widths.items()
  }
  return convolve(projected, config, state, documents, use_bias=use_bias)


def convolve(
  projected: Mapping[str, jax.Array],
  config: ModelConfig,
  state: Mapping[str, jax.Array] | None,
  documents: jax.Array | None,
  *,
  use_bias: bool = False,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """A causal convolution of each projection, where configured.

  Returns the results and the convolutions' new states.
  """
  if not config.conv_window:
    return dict(projected), {}
  convolved, new_state = {}, {}
  for name, p in projected.items():
    conv = ShortConv(config.conv_window, p.dtype, use_bias, name=f"conv_{name}")
    convolved[name], new_state[name] = conv(
      p, state[name] if state else None, documents
    )
  return convolved, new_state


def init_conv_state(
  config: ModelConfig, batch_size: int, widths: Mapping[str, int]
) -> dict[str, jax.Array]:
  """Zeros for the last window - 1 inputs of each projection's convolution."""
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
  """[B, H, T, K] -> [B, T, H K], with heads side by side."""
  x = x_BHTK.swapaxes(1, 2)
  return x.reshape(*x.shape[:2], -1)


def silu_gate(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) * up, the hidden activation of SwiGLU."""
  return nn.silu(gate) * up


class SwiGLU(nn.Module):
  """W_down (silu(W_gate x) * W_up x)."""

  config: ModelConfig
  hidden: int
  owner: tuple[str, ...] = ()

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    make = functools.partial(dense, config=self.config, owner=self.owner)
    gate = make(self.hidden, axes=("embed", "mlp"), name="gate")(x_BTD)
    up = make(self.hidden, axes=("embed", "mlp"), name="up")(x_BTD)
    hidden = nn.with_logical_constraint(
      silu_gate(gate, up), ("batch", "length", "mlp")
    )
    return make(
      self.config.width, axes=("mlp", "embed"), name="down", is_output=True
    )(hidden)


def wants_dynamics(module: nn.Module) -> bool:
  """Whether `dynamics` is requested; never in `init`, where all is mutable."""
  return (
    module.is_mutable_collection("dynamics") and not module.is_initializing()
  )


def sow_dynamics(module: nn.Module, name: str, values: dict | None):
  """Records scalars about inner learning if `dynamics` is requested."""
  for key, value in (values or {}).items():
    module.sow("dynamics", f"{name}.{key}", value)
