"""The continuum memory system as the FFN of a block (paper section 7).

  x <- x + SwiGLU_l(RMS_l(x); W_l + D_l)   fastest level first, the last slow

The k levels split the FFN's hidden width, so that models with and without CMS
have equal parameters.  The value that a fast level learns to answer with:

  mixer_value   the sequence layer's values v_t, RMS-normalised
  mixer_linear  a learned linear map of the sequence layer's output

Legend: B batch, T tokens, D model, F hidden.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hope_jax.config import ModelConfig
from hope_jax.memory import chunks, cms
from hope_jax.memory.architectures import rms_normalize
from hope_jax.models import layers
from hope_jax.models.interface import MixerOutput


def init_state(
  config: ModelConfig, batch_size: int, piece_length: int | None = None
) -> dict[str, chunks.ChunkState]:
  """D = 0 for every level that has a chunk length."""
  width = config.width
  return {
    f"cms_{i}": chunks.fresh(
      cms.zero_state(
        cms.LevelWeights(
          jnp.zeros((width, hidden)),
          jnp.zeros((width, hidden)),
          jnp.zeros((hidden, width)),
        ),
        batch_size,
      ),
      config.cms.chunk_lengths[i],
      piece_length,
    )
    for i, hidden in enumerate(config.cms.hidden)
    if config.cms.chunk_lengths[i]
  }


class FastLevel(nn.Module):
  """One fast level: slow weights W_0 and its learn rate as parameters."""

  config: ModelConfig
  hidden: int
  chunk_length: int
  level: str

  @nn.compact
  def __call__(self, n_BTD, value_BTD, state, segments):
    cfg = self.config
    std = layers.INIT_STD
    slow = cms.LevelWeights(
      self._weight("gate", std, ("embed", "mlp")),
      self._weight("up", std, ("embed", "mlp")),
      self._weight("down", std / (2 * cfg.num_layers) ** 0.5, ("mlp", "embed")),
    )
    start = math.log(math.expm1(cfg.cms.initial_learn_rate))
    rate: Any = self.param(
      "learn_rate", lambda key: jnp.full((), start, jnp.float32)
    )
    n = n_BTD.astype(jnp.float32)
    if not cfg.is_live(self.level):
      return cms.feed_forward(slow, None, n).astype(n_BTD.dtype), state
    y, state, dynamics = cms.run_level(
      slow,
      n,
      value_BTD,
      jax.nn.softplus(rate),
      chunk_length=self.chunk_length,
      error_clip=cfg.cms.error_clip,
      policy=cfg.memory.remat,
      state=state,
      segments=segments,
      with_dynamics=self.is_mutable_collection("dynamics"),
    )
    if dynamics is not None:
      dynamics["learn_rate"] = jax.nn.softplus(rate)
    layers.sow_dynamics(self, self.level, dynamics)
    return y.astype(n_BTD.dtype), state

  def _weight(self, name, std, axes) -> Any:
    sizes = {"embed": self.config.width, "mlp": self.hidden}
    return self.param(
      name,
      nn.with_logical_partitioning(nn.initializers.normal(std), axes),
      tuple(sizes[axis] for axis in axes),
    )


class ContinuumMemory(nn.Module):
  """All levels in sequence, each with its own norm and residual."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    mixed: MixerOutput,
    state: dict[str, Any] | None = None,
    segments: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, Any] | None]:
    cfg = self.config
    new_state = {}
    value = None
    if any(cfg.cms.chunk_lengths):
      value = mixed.values
      if cfg.cms.value == "mixer_linear":
        value = layers.dense(cfg.width, cfg, ("embed", "heads"), "value")(
          mixed.y
        )
      value = rms_normalize(value)
    for i, hidden in enumerate(cfg.cms.hidden):
      n = layers.rms_norm(cfg, f"norm_{i}")(x_BTD)
      chunk_length = cfg.cms.chunk_lengths[i]
      if not chunk_length:
        y = layers.SwiGLU(cfg, hidden, name=f"level_{i}")(n)
      else:
        level = f"cms_{i}"
        y, new_state[level] = FastLevel(
          cfg, hidden, chunk_length, level, name=f"level_{i}"
        )(n, value, state[level] if state else None, segments)
      x_BTD = x_BTD + y
    return x_BTD, new_state if state is not None else None
