"""The continuum memory system as the FFN of a block (paper section 7).

  sequential    x <- x + SwiGLU_l(RMS_l(x); W_l + D_l), fastest level first (73)
  independent   x <- x + sum_l w_l SwiGLU_l(RMS_l(x); W_l + D_l)            (74)
  nested        as sequential with one W for all levels; a level restarts from
                its slower neighbour's state when that one's chunk ends     (72)

The last level is slow.  The k levels split the FFN's hidden width (nested ones
share one block of the whole width), so that models with and without CMS have
equal parameters.  A fast level learns to answer its own input n_t with a value:

  mixer_linear  a learned linear map of the sequence layer's output
  mixer_value   the sequence layer's values v_t
  mixer_pair    the same, and the key is the sequence layer's k_t, not n_t

keys and values RMS-normalised; or from the model's loss on what came next
(`models/next_token.py`), which gives the levels their D (`GivenState`).

Legend: B batch, T tokens, D model, F hidden.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hope_jax.config import ModelConfig
from hope_jax.memory import chunks, cms
from hope_jax.memory.architectures import rms_normalize
from hope_jax.models import layers
from hope_jax.models.interface import MixerOutput


def block_hidden(config: ModelConfig, level: int) -> int:
  """Hidden width of a level's block."""
  hidden = config.cms.hidden
  return sum(hidden) if config.cms.connection == "nested" else hidden[level]


def init_state(
  config: ModelConfig, batch_size: int, piece_length: int | None = None
) -> dict[str, chunks.ChunkState]:
  """D = 0 for every level that has a chunk length."""
  if config.cms.connection == "nested":  # its levels need their places
    piece_length = None
  state = {}
  for i, chunk_length in enumerate(config.cms.fast_lengths):
    width, hidden = config.width, block_hidden(config, i)
    shapes = (width, hidden), (width, hidden), (hidden, width)
    zero = cms.LevelWeights(*(jnp.zeros(shape) for shape in shapes))
    now = cms.zero_state(zero, batch_size)
    state[f"cms_{i}"] = chunks.fresh(now, chunk_length, piece_length)
  return state


def _weights(module: nn.Module, config: ModelConfig, hidden: int) -> Any:
  """W_0 of a block as parameters of `module`."""
  std, width = layers.INIT_STD, config.width
  down_std = std / (2 * config.num_layers) ** 0.5

  def weight(name: str, std: float, axes: tuple[str, str]) -> Any:
    shape = (width, hidden) if axes[0] == "embed" else (hidden, width)
    init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
    return module.param(name, init, shape)

  return cms.LevelWeights(
    weight("gate", std, ("embed", "mlp")),
    weight("up", std, ("embed", "mlp")),
    weight("down", down_std, ("mlp", "embed")),
  )


def _rule(
  module: nn.Module, config: ModelConfig, chunk_length: int, end: str = ""
) -> cms.Rule:
  """A level's rates as parameters of `module`, softplus of `learn_rate` and
  `forget`; alpha, if the level forgets, starts at the configured half-life."""

  def scalar(name: str, start: float) -> jax.Array:
    logit = math.log(math.expm1(start))
    value: Any = module.param(  # not weakly typed, or a step compiles again
      name + end, lambda key: jnp.full((), logit, jnp.float32)
    )
    return jax.nn.softplus(value)

  cfg = config.cms
  rate = scalar("learn_rate", cfg.initial_learn_rate)
  log_retention = None
  if cfg.half_life:
    log_retention = -scalar("forget", math.log(2) / cfg.half_life)
  return cms.Rule(rate, log_retention, chunk_length, cfg.error_clip)


class GivenState(NamedTuple):
  """D of a level that learns elsewhere; which places read it, None: all."""

  weight: cms.LevelWeights
  inherits: jax.Array | None


def is_given(state: dict[str, Any]) -> bool:
  """Whether levels learn elsewhere."""
  return any(isinstance(level, GivenState) for level in state.values())


def _given(slow: cms.LevelWeights, n: jax.Array, state: Any) -> jax.Array:
  """y [B, T, D] of a block at given weights; W_0 where none are given."""
  if not isinstance(state, GivenState):
    return cms.feed_forward(slow, n)
  reads = cms.slow_products(slow, n)
  return cms.forward(slow, state.weight, reads, state.inherits).y


class Scale(nn.Module):
  """The scale of an RMS norm that is applied elsewhere."""

  width: int

  @nn.compact
  def __call__(self) -> Any:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    return self.param("scale", init, (self.width,))


class FastLevel(nn.Module):
  """One fast level by itself."""

  config: ModelConfig
  number: int

  @nn.compact
  def __call__(self, n_BTD, keys_BTD, values_BTD, state, segments):
    cfg, level = self.config, f"cms_{self.number}"
    slow = _weights(self, cfg, block_hidden(cfg, self.number))
    rule = _rule(self, cfg, cfg.cms.chunk_lengths[self.number])
    n = n_BTD.astype(jnp.float32)
    if cfg.cms.signal == "next_token":
      return _given(slow, n, state).astype(n_BTD.dtype), state
    if not cfg.is_live(level):
      return cms.feed_forward(slow, n).astype(n_BTD.dtype), state
    y, state, dynamics = cms.run_level(
      slow,
      n,
      values_BTD,
      rule,
      keys=keys_BTD,
      policy=cfg.memory.remat,
      state=state,
      segments=segments,
      with_dynamics=layers.wants_dynamics(self),
    )
    layers.sow_dynamics(self, level, dynamics)
    return y.astype(n_BTD.dtype), state


class NestedLevels(nn.Module):
  """All levels on one block, the slow one included: x -> x + ..."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    scales: list[jax.Array],
    keys_BTD: jax.Array | None,
    values_BTD: Any,
    state: dict[str, Any] | None,
    segments: jax.Array | None,
  ) -> tuple[jax.Array, dict[str, Any] | None]:
    cfg, fast = self.config, self.config.cms.fast_lengths
    slow = _weights(self, cfg, block_hidden(cfg, 0))
    levels = [
      cms.NestedLevel(
        scale,
        _rule(self, cfg, length, f"_{i}"),
        cfg.is_live(f"cms_{i}"),
        cfg.norm_eps,
      )
      for i, (length, scale) in enumerate(zip(fast, scales, strict=False))
    ]
    x = x_BTD.astype(jnp.float32)
    if cfg.cms.signal == "next_token":
      given = list((state or {}).values())
      for at, scale in zip(given, scales, strict=False):
        n = rms_normalize(x, cfg.norm_eps) * scale[None, None]
        x = x + _given(slow, n, at)
      scales = scales[len(given) :]
    elif any(level.live for level in levels):
      x, new_state, dynamics = cms.run_nested(
        slow,
        x,
        values_BTD,
        levels,
        keys=keys_BTD,
        policy=cfg.memory.remat,
        state=list(state.values()) if state else None,
        segments=segments,
        with_dynamics=layers.wants_dynamics(self),
      )
      for i, values in enumerate(dynamics):
        layers.sow_dynamics(self, f"cms_{i}", values)
      if state and new_state:
        state = {f"cms_{i}": level for i, level in enumerate(new_state)}
      scales = scales[len(fast) :]
    for scale in scales:
      n = rms_normalize(x, cfg.norm_eps) * scale[None, None]
      x = x + cms.feed_forward(slow, n)
    return x.astype(x_BTD.dtype), state


class ContinuumMemory(nn.Module):
  """All levels, each with its own norm."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    mixed: MixerOutput | None,
    state: dict[str, Any] | None = None,
    segments: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, Any] | None]:
    cfg = self.config
    keys, values = self._signal(mixed)
    count = cfg.cms.levels
    if cfg.cms.connection == "nested":
      scales = [Scale(cfg.width, name=f"norm_{i}")() for i in range(count)]
      return NestedLevels(cfg, name="levels")(
        x_BTD, scales, keys, values, state, segments
      )
    new_state = {}
    input_BTD = x_BTD
    for i in range(count):
      is_chain = cfg.cms.connection == "sequential"
      n = layers.rms_norm(cfg, f"norm_{i}")(x_BTD if is_chain else input_BTD)
      if i >= len(cfg.cms.fast_lengths):
        y = layers.SwiGLU(cfg, cfg.cms.hidden[i], name=f"level_{i}")(n)
      else:
        level = f"cms_{i}"
        y, new_state[level] = FastLevel(cfg, i, name=f"level_{i}")(
          n, keys, values, state[level] if state else None, segments
        )
      if not is_chain:
        share: Any = self.param(
          f"share_{i}", lambda key: jnp.ones((), jnp.float32)
        )
        y = y * share.astype(y.dtype)
      x_BTD = x_BTD + y
    return x_BTD, new_state if state is not None else None

  def _signal(self, mixed: MixerOutput | None) -> tuple[Any, Any]:
    """Keys (None: each level's own input) and values of all levels."""
    cfg = self.config
    if not cfg.cms.fast_lengths or cfg.cms.signal == "next_token":
      return None, None
    assert mixed is not None
    values = mixed.values
    if cfg.cms.value == "mixer_linear":
      values = layers.dense(cfg.width, cfg, ("embed", "heads"), "value")(
        mixed.y
      )
    is_pair = cfg.cms.value == "mixer_pair"
    keys = rms_normalize(mixed.keys) if is_pair else None
    return keys, rms_normalize(values)
