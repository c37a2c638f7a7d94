"""Rotary positions (RoPE, 2104.09864).

Legend: B batch, T tokens, H heads, K head dim.
"""

import jax
import jax.numpy as jnp

from hope_jax.config import ModelConfig, RopeScaling


def frequencies(
  half: int, base: float, scaling: RopeScaling | None
) -> jax.Array:
  """Angle per token, in radians, of each of the K / 2 rotations."""
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


def rotate_positions(
  x_BTHK: jax.Array, position_T: jax.Array, config: ModelConfig
) -> jax.Array:
  """`rotate` with the model's base and scaling."""
  return rotate(x_BTHK, position_T, config.rope_base, config.rope_scaling)
