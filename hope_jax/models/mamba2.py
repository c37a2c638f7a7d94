"""Mamba2 (SSD, 2405.21060): a matrix memory with one decay per head.

  S_t = exp(-e^A s_t) S_{t-1} + s_t v_t k_t^T
  y_t = W_o RMS((S_t q_t + D v_t) * silu(n_t W_z))

with s = softplus(n w_s + a); A, a and D are learned per head.  In the paper's
symbols q, k, v, s are C, B, x, dt.  q, k and v are SiLU of causal convolutions;
all heads share one q and one k, which are not scaled, and the norm is taken
over all heads together.  The layout is as published: heads of 64, keys of 128,
values with twice the model's width in total, and no FFN.

Initial values are those of the authors' code: e^A uniform in 1 .. 16,
softplus(a) log-uniform in 0.001 .. 0.1, D = 1.

Legend: B batch, T tokens, D model, H heads, K key dim, E value dim of a head.
"""

import flax.linen as nn
import jax

from hope_jax.config import ModelConfig
from hope_jax.memory.norms import rms_normalize
from hope_jax.models import layers, linear, problems
from hope_jax.models.interface import MixerOutput, Problem
from hope_jax.models.parameters import parameter

KEY_DIM, HEAD_DIM = 128, 64


def layout(config: ModelConfig) -> linear.Layout:
  """The published layout at the config's width."""
  heads = max(1, 2 * config.width // HEAD_DIM)
  return linear.Layout(heads, KEY_DIM, 2 * config.width // heads)


def _widths(config: ModelConfig) -> dict[str, int]:
  """Width of each projection; one query and one key for all heads."""
  shape = layout(config)
  values = shape.heads * shape.value_dim
  return {"query": KEY_DIM, "key": KEY_DIM, "value": values}


def init_state(
  config: ModelConfig, batch_size: int, read_size: int | None = None
) -> linear.LinearState:
  """S = 0, no token read."""
  del read_size
  shape, widths = layout(config), _widths(config)
  return linear.zero_state(config, batch_size, shape, widths)


def _rule(gates: linear.GateInputs) -> linear.Rule:
  alpha, step = linear.decay(gates, 1.0)
  return linear.Rule(alpha, step, None)


class Mamba2(nn.Module):
  """The sequence layer."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: linear.LinearState | None = None,
    documents: jax.Array | None = None,
  ) -> MixerOutput:
    cfg, heads = self.config, layout(self.config).heads
    before = state or init_state(cfg, x_BTD.shape[0])
    projected, conv = layers.projections(
      x_BTD, _widths(cfg), cfg, before.conv, documents, use_bias=True
    )
    if cfg.conv_window:
      projected = {name: nn.silu(p) for name, p in projected.items()}
    rule = linear.Gates(cfg, _rule, heads, name="gates")(x_BTD)
    q, k = (
      layers.split_heads(projected[name], 1).repeat(heads, 1)
      for name in ("query", "key")
    )
    v = layers.split_heads(projected["value"], heads)
    o, after = linear.run_rule(
      linear.Tokens(k, v, q, rule), before.memory, documents, cfg
    )
    if state is not None:
      state = linear.LinearState(after, conv)
    y_BTD = ReadOut(cfg, name="readout")(x_BTD, o, v)
    return MixerOutput(y_BTD, projected["key"], projected["value"], state)


class ReadOut(nn.Module):
  """W_o RMS((o + D v) * silu(n W_z))."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, o: jax.Array, v: jax.Array) -> jax.Array:
    cfg, shape = self.config, layout(self.config)
    width = shape.heads * shape.value_dim
    ones = nn.initializers.ones
    skip = parameter(self, "norm_skip", ones, (shape.heads,), ("heads",))
    y = layers.merge_heads(o + skip[None, :, None, None] * v)
    gate = layers.dense(width, cfg, ("embed", "heads"), "gate")
    y = y * nn.silu(gate(x_BTD)).astype(y.dtype)
    scale = linear.norm_scale(self, width)[None, None]
    y = rms_normalize(y, cfg.norm_eps) * scale
    return layers.dense(
      cfg.width, cfg, ("heads", "embed"), "output", is_output=True
    )(y)


def describe(config: ModelConfig) -> list[Problem]:
  """See `models/interface.py`."""
  del config
  rule = "GD, step dt, decay exp(-dt A)"
  return [problems.linear(problems.DOT, rule)]
