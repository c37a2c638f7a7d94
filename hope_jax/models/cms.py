"""The continuum memory system as the FFN of a block (paper section 7).

  sequential    x <- x + SwiGLU_l(RMS_l(x); W_l + D_l), fastest level first (73)
  independent   x <- x + sum_l w_l SwiGLU_l(RMS_l(x); W_l + D_l)            (74)
  nested        as sequential with one W for all levels; a level restarts from
                its slower neighbour's state when the latter's chunk ends   (72)

The last level is slow.  The k levels split the FFN's hidden width (nested ones
share one block of the whole width), so that models with and without CMS have
equal parameters.  A fast level learns to answer its own input n_t with a value:

  mixer_linear  a learned linear map of the sequence layer's output
  mixer_value   the sequence layer's values v_t
  mixer_pair    the same, and the key is the sequence layer's k_t, not n_t

These keys and values are RMS-normalised.  With the next-token signal the levels
learn from the model's own loss instead (`models/next_token.py`), which gives
them their D (`GivenLevel`).

Legend: B batch, T tokens, D model, F hidden.
"""

import dataclasses
import math
from fractions import Fraction
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree

from hope_jax.config import ModelConfig
from hope_jax.memory import chunks, cms
from hope_jax.memory.norms import rms_normalize
from hope_jax.models import layers
from hope_jax.models.fast_state import BlockState
from hope_jax.models.interface import (
  META_LEARNED,
  OUTER_LOSS,
  MixerOutput,
  Problem,
)
from hope_jax.models.parameters import parameter


def block_hidden(config: ModelConfig, level: int) -> int:
  """Hidden width of a level's block."""
  hidden = config.cms.hidden
  return sum(hidden) if config.cms.connection == "nested" else hidden[level]


def init_state(
  config: ModelConfig, batch_size: int, read_size: int | None = None
) -> dict[str, chunks.ChunkState]:
  """D = 0 for every level that has a chunk length."""
  if config.cms.connection == "nested":  # its levels track their positions
    read_size = None
  state = {}
  for i, chunk_length in enumerate(config.cms.fast_lengths):
    width, hidden = config.width, block_hidden(config, i)
    shapes = (width, hidden), (width, hidden), (hidden, width)
    zero = cms.LevelWeights(*(jnp.zeros(shape) for shape in shapes))
    now = cms.zero_state(zero, batch_size)
    state[f"cms_{i}"] = chunks.fresh(now, chunk_length, read_size)
  return state


SHARED = ("cms_shared",)  # owner of parameters that all levels use


def _owner(level: int) -> tuple[str, ...]:
  return (f"cms_{level}",)


def _weights(
  module: nn.Module, config: ModelConfig, hidden: int, owner: tuple[str, ...]
) -> Tree:
  """W_0 of a block as parameters of `module`."""
  std, width = layers.INIT_STD, config.width
  down_std = std / (2 * config.num_layers) ** 0.5

  def weight(name: str, std: float, axes: tuple[str, str]) -> Tree:
    shape = (width, hidden) if axes[0] == "embed" else (hidden, width)
    init = nn.initializers.normal(std)
    return parameter(module, name, init, shape, axes, owner=owner)

  return cms.LevelWeights(
    weight("gate", std, ("embed", "mlp")),
    weight("up", std, ("embed", "mlp")),
    weight("down", down_std, ("mlp", "embed")),
  )


def _rule(
  module: nn.Module, config: ModelConfig, level: int, end: str = ""
) -> cms.Rule:
  """A level's rates, softplus of the parameters `learn_rate` and `forget` of
  `module`; alpha, if the level forgets, starts at the configured half-life."""

  def scalar(name: str, start: float) -> jax.Array:
    logit = math.log(math.expm1(start))
    return jax.nn.softplus(_scalar(module, name + end, logit, level))

  cfg = config.cms
  rate = scalar("learn_rate", cfg.initial_learn_rate)
  log_retention = None
  if cfg.half_life:
    log_retention = -scalar("forget", math.log(2) / cfg.half_life)
  length = cfg.chunk_lengths[level]
  return cms.Rule(rate, log_retention, length, cfg.error_clip)


def _scalar(module: nn.Module, name: str, start: float, level: int) -> Tree:
  """A learned number of a level."""
  # With a dtype: a weakly typed array would make the step compile again.
  init = lambda key, shape: jnp.full(shape, start, jnp.float32)
  return parameter(module, name, init, (), (), role="rate", owner=_owner(level))


class GivenLevel(NamedTuple):
  """D of a level that learns elsewhere; which places read it (None: all)."""

  weight: cms.LevelWeights
  inherits: jax.Array | None


def _given(
  slow: cms.LevelWeights, n: jax.Array, level: GivenLevel | None
) -> jax.Array:
  """y [B, T, D] of a block with the given D; with W_0 if none is given."""
  if level is None:
    return cms.feed_forward(slow, n)
  reads = cms.slow_products(slow, n)
  return cms.forward(slow, level.weight, reads, level.inherits).y


class _Tokens(NamedTuple):
  """The keys and values that the levels learn, [B, T, D], and document numbers
  [B, T].  Without keys each level's own input is the key."""

  keys: jax.Array | None
  values: Tree
  documents: jax.Array | None


class Scale(nn.Module):
  """The scale of an RMS norm that is applied elsewhere."""

  width: int
  owner: tuple[str, ...]

  @nn.compact
  def __call__(self) -> Tree:
    return parameter(
      self,
      "scale",
      nn.initializers.ones,
      (self.width,),
      ("norm",),
      role="norm",
      owner=self.owner,
    )


class FastLevel(nn.Module):
  """A fast level of a sequential or independent CMS."""

  config: ModelConfig
  number: int

  @nn.compact
  def __call__(
    self,
    n_BTD: jax.Array,
    tokens: _Tokens,
    state: chunks.ChunkState | None,
    given: GivenLevel | None,
  ) -> tuple[jax.Array, chunks.ChunkState | None]:
    cfg, level = self.config, f"cms_{self.number}"
    hidden = block_hidden(cfg, self.number)
    slow = _weights(self, cfg, hidden, _owner(self.number))
    rule = _rule(self, cfg, self.number)
    n = n_BTD.astype(jnp.float32)
    if cfg.cms.signal == "next_token":
      return _given(slow, n, given).astype(n_BTD.dtype), state
    if not cfg.is_live(level):
      return cms.feed_forward(slow, n).astype(n_BTD.dtype), state
    out = cms.run_level(
      slow,
      n,
      tokens.values,
      rule,
      keys=tokens.keys,
      policy=cfg.memory.remat,
      state=state,
      documents=tokens.documents,
      with_dynamics=layers.wants_dynamics(self),
    )
    layers.sow_dynamics(self, level, out.dynamics)
    return out.outputs.astype(n_BTD.dtype), out.state


class NestedLevels(nn.Module):
  """All levels on one shared block, including the slow one: x -> x + ..."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    scales: list[jax.Array],
    tokens: _Tokens,
    state: dict[str, Tree] | None,
    given: dict[str, GivenLevel] | None,
  ) -> tuple[jax.Array, dict[str, Tree] | None]:
    cfg, fast = self.config, self.config.cms.fast_lengths
    slow = _weights(self, cfg, block_hidden(cfg, 0), SHARED)
    levels = [
      cms.NestedLevel(
        scale,
        _rule(self, cfg, i, f"_{i}"),
        cfg.is_live(f"cms_{i}"),
        cfg.norm_eps,
      )
      for i, (_, scale) in enumerate(zip(fast, scales, strict=False))
    ]
    x = x_BTD.astype(jnp.float32)
    if cfg.cms.signal == "next_token":
      learned = list((given or {}).values())
      for level, scale in zip(learned, scales, strict=False):
        n = rms_normalize(x, cfg.norm_eps) * scale[None, None]
        x = x + _given(slow, n, level)
      scales = scales[len(learned) :]
    elif any(level.writes for level in levels):
      out = cms.run_nested(
        slow,
        x,
        tokens.values,
        levels,
        keys=tokens.keys,
        policy=cfg.memory.remat,
        state=list(state.values()) if state else None,
        documents=tokens.documents,
        with_dynamics=layers.wants_dynamics(self),
      )
      x = out.outputs
      for name, values in (out.dynamics or {}).items():
        layers.sow_dynamics(self, name, values)
      if state and out.state:
        state = {f"cms_{i}": level for i, level in enumerate(out.state)}
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
    state: BlockState | None = None,
    documents: jax.Array | None = None,
  ) -> tuple[jax.Array, BlockState | None]:
    cfg, input_BTD = self.config, x_BTD
    tokens = _Tokens(*self._signal(mixed), documents)
    fast = state.cms if state else None
    given = state.given if state else None
    if cfg.cms.connection == "nested":
      scales = [
        Scale(cfg.width, _owner(i), name=f"norm_{i}")()
        for i in range(cfg.cms.levels)
      ]
      nested = NestedLevels(cfg, name="levels")
      x_BTD, fast = nested(x_BTD, scales, tokens, fast, given)
    else:
      x_BTD, fast = self._one_by_one(x_BTD, tokens, fast, given)
    if state is not None:
      stream = input_BTD if given else None
      state = dataclasses.replace(state, cms=fast, given=None, stream=stream)
    return x_BTD, state

  def _one_by_one(
    self,
    x_BTD: jax.Array,
    tokens: _Tokens,
    state: dict[str, Tree] | None,
    given: dict[str, GivenLevel] | None,
  ) -> tuple[jax.Array, dict[str, Tree]]:
    """Levels in sequence or side by side: (x after them, their states)."""
    cfg, input_BTD, after = self.config, x_BTD, {}
    is_chain = cfg.cms.connection == "sequential"
    for i in range(cfg.cms.levels):
      n = layers.rms_norm(cfg, f"norm_{i}", _owner(i))(
        x_BTD if is_chain else input_BTD
      )
      if i >= len(cfg.cms.fast_lengths):
        hidden = cfg.cms.hidden[i]
        y = layers.SwiGLU(cfg, hidden, _owner(i), name=f"level_{i}")(n)
      else:
        level = f"cms_{i}"
        y, fast = FastLevel(cfg, i, name=f"level_{i}")(
          n,
          tokens,
          state.get(level) if state else None,
          given[level] if given else None,
        )
        if fast is not None:
          after[level] = fast
      if not is_chain:
        y = y * _scalar(self, f"share_{i}", 1.0, i).astype(y.dtype)
      x_BTD = x_BTD + y
    return x_BTD, after

  def _signal(self, mixed: MixerOutput | None) -> tuple[Tree, Tree]:
    """Keys (None: each level's own input) and values of all levels."""
    cfg = self.config
    if not cfg.cms.fast_lengths or cfg.cms.signal == "next_token":
      return None, None
    assert mixed is not None
    values = mixed.values
    if cfg.cms.value == "mixer_linear":
      values = layers.dense(
        cfg.width, cfg, ("embed", "heads"), "value", owner=SHARED
      )(mixed.y)
    is_pair = cfg.cms.value == "mixer_pair"
    keys = rms_normalize(mixed.keys) if is_pair else None
    return keys, rms_normalize(values)


_PAIRS = {  # what a level learns: key -> value
  "next_token": ("token", "next token"),
  "mixer_linear": ("n", "RMS(y W)"),
  "mixer_value": ("n", "RMS(v)"),
  "mixer_pair": ("RMS(k)", "RMS(v)"),
}


def describe(config: ModelConfig) -> list[Problem]:
  """The fast levels, fastest first; see `models/interface.py`."""
  return [_level(config, i) for i in range(len(config.cms.fast_lengths))]


def _level(config: ModelConfig, level: int) -> Problem:
  """A fast level of the continuum memory system (eq. 70-74)."""
  cfg = config.cms
  length = cfg.fast_lengths[level]
  key, value = _PAIRS.get(cfg.signal) or _PAIRS[cfg.value]
  objective = f"associative: 1/2 ‖MLP({key}) - {value}‖²"
  rate = f"proximal step / {length}"
  if cfg.signal == "next_token":
    objective, rate = OUTER_LOSS, f"step, mean of {length} tokens"
  nested = f"restarts from cms_{level + 1} when that one's chunk ends"
  is_last = level + 1 == len(cfg.fast_lengths)
  transfer = {
    "sequential": "backpropagation through the chain of levels (eq. 73)",
    "nested": f"{'never restarts' if is_last else nested} (eq. 72)",
    "independent": "learned weighted sum of the levels (eq. 74)",
  }
  retention = f"start, half-life {h:g}" if (h := cfg.half_life) else "none"
  return Problem(
    name=f"cms_{level}",
    frequency=Fraction(1, length),
    context=f"({key}, {value}) of the last {length} tokens",
    objective=objective,
    rule=f"GD; {rate}; momentum: none; retention:"
    f" {retention}; error clip: {cfg.error_clip:g}; read: chunk",
    transfer=f"{META_LEARNED}; {transfer[cfg.connection]}",
  )
