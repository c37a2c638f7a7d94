"""Softmax attention with rotary positions (Transformer++, Hope-Attention).

Causal, RoPE on q and k, optional causal depthwise convolution on q, k and v;
groups of query heads may share a head of keys and values (2305.13245).  The
state is a key / value cache of `config.context_length` positions.

Legend: B batch, T tokens, L cache positions, H heads (G of keys and values),
K head dim, D model.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from hope_jax.model_config import ModelConfig, RopeScaling
from hope_jax.models import layers
from hope_jax.models.interface import MixerOutput


@flax.struct.dataclass
class AttentionState:
  """Keys and values of all past tokens [B, L, G, K]; position: their count."""

  keys: jax.Array
  values: jax.Array
  position: jax.Array
  conv: dict[str, jax.Array]


def widths(config: ModelConfig) -> dict[str, int]:
  """Widths H K of the queries, G K of keys and values."""
  of_group = config.kv_heads * config.head_dim
  return {"query": config.width, "key": of_group, "value": of_group}


def init_state(
  config: ModelConfig, batch_size: int, piece_length: int | None = None
) -> AttentionState:
  """An empty cache."""
  del piece_length
  dtype = jnp.dtype(config.dtype)
  shape = (
    batch_size,
    config.context_length,
    config.kv_heads,
    config.head_dim,
  )
  return AttentionState(
    keys=jnp.zeros(shape, dtype),
    values=jnp.zeros(shape, dtype),
    position=jnp.zeros((), jnp.int32),
    conv=layers.init_conv_state(config, batch_size, widths(config)),
  )


def frequencies(
  half: int, base: float, scaling: RopeScaling | None
) -> jax.Array:
  """Radians per token of each of K / 2 rotations."""
  frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if scaling is None or scaling.factor == 1:
    return frequency
  low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
  turns = scaling.original_context_length * frequency / (2 * jnp.pi)
  kept = jnp.clip((turns - low) / (high - low), 0, 1)
  return frequency * (kept + (1 - kept) / scaling.factor)


def rotate(
  x_BTHK: jax.Array,
  position_T: jax.Array,
  base: float,
  scaling: RopeScaling | None = None,
) -> jax.Array:
  """Rotary position embedding over halves of the head dim, in float32."""
  frequency = frequencies(x_BTHK.shape[-1] // 2, base, scaling)
  angle = position_T.astype(jnp.float32)[:, None] * frequency[None]
  sin, cos = jnp.sin(angle)[None, :, None], jnp.cos(angle)[None, :, None]
  first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x_BTHK.dtype)


class Attention(nn.Module):
  """Multi-head causal softmax attention."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: AttentionState | None = None,
    segments: jax.Array | None = None,
  ) -> MixerOutput:
    cfg = self.config
    batch, length, _ = x_BTD.shape
    projected, conv_state = layers.projections(
      x_BTD,
      widths(cfg),
      cfg,
      state.conv if state else None,
      segments,
    )
    heads = (batch, length, -1, cfg.head_dim)
    projected = {name: p.reshape(heads) for name, p in projected.items()}
    start = state.position if state else jnp.zeros((), jnp.int32)
    position = start + jnp.arange(length)
    rope = cfg.rope_base, cfg.rope_scaling
    q = rotate(projected["query"], position, *rope)
    k = rotate(projected["key"], position, *rope)
    v = projected["value"]
    if state is None:
      mask = None
      if segments is not None:
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]
      y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)
    else:
      cache = [
        jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)
        for old, new in ((state.keys, k), (state.values, v))
      ]
      visible = jnp.arange(cfg.context_length)[None] <= position[:, None]
      y = jax.nn.dot_product_attention(
        q, cache[0], cache[1], mask=visible[None, None]
      )
      state = AttentionState(cache[0], cache[1], start + length, conv_state)
    y_BTD = layers.dense(
      cfg.width, cfg, ("heads", "embed"), "output", is_output=True
    )(y.reshape(x_BTD.shape))
    group = cfg.num_heads // cfg.kv_heads
    keys, values = (
      projected[name].repeat(group, axis=2).reshape(x_BTD.shape)
      for name in ("key", "value")
    )
    return MixerOutput(y_BTD, keys, values, state)
