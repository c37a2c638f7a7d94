"""The residual block of every model: sequence layer, then FFN or CMS.

  x <- x + mixer(RMS(x));  x <- x + FFN(RMS(x))  or  x <- CMS(x)  or neither

(paper eq. 94-97 for Hope; the baselines are the same block with another mixer
and one slow FFN level.)  All blocks of a model are alike, or blocks of a few
kinds take turns: Mamba, FFN, attention with a window, FFN (Samba, 2406.07522).
RWKV-7 has LayerNorms, a channel mix in the FFN's place and a `Depth` beside the
residual stream; TTT's layers read the stream itself, too.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax

from hope_jax.config import ModelConfig
from hope_jax.config.model import (
  ATTENTION_LAYERS,
  LINEAR_LAYERS,
  MEMORY_LAYERS,
  TTT_LAYERS,
)
from hope_jax.models import (
  attention,
  cms,
  layers,
  linear,
  lstm,
  mamba,
  rwkv7,
  srwm,
  titans,
  titans_attention,
  ttt,
)

# name -> (sequence layer, its init_state)
SEQUENCE_LAYERS = {
  "transformer": (attention.Attention, attention.init_state),
  "hope_attention": (attention.Attention, attention.init_state),
  **dict.fromkeys(
    MEMORY_LAYERS, (titans.SelfModifyingTitans, titans.init_state)
  ),
  **dict.fromkeys(
    ("titans_mag", "titans_mal"),
    (titans_attention.MemoryAndAttention, titans_attention.init_state),
  ),
  "titans_mac": (
    titans_attention.MemoryAsContext,
    titans_attention.init_context_state,
  ),
  **dict.fromkeys(TTT_LAYERS, (ttt.TestTimeTraining, ttt.init_state)),
  **dict.fromkeys(LINEAR_LAYERS, (linear.LinearMemory, linear.init_state)),
  "mamba": (mamba.Mamba, mamba.init_state),
  "rwkv7": (rwkv7.TimeMix, rwkv7.init_state),
  "lstm": (lstm.LSTM, lstm.init_state),
  "srwm": (srwm.SelfReferentialMatrix, srwm.init_state),
}


def pattern(config: ModelConfig) -> tuple[ModelConfig, ...]:
  """Configs of the blocks that take turns; mostly there is one kind only."""
  if len(config.pattern) == 1:
    return (config,)

  def block(name: str) -> ModelConfig:
    conv_window = 0 if name in ATTENTION_LAYERS else config.conv_window
    return dataclasses.replace(
      config, sequence_layer=name, conv_window=conv_window
    )

  return tuple(map(block, config.pattern))


@flax.struct.dataclass
class BlockState:
  """Fast state of one block; `cms` has one entry per fast level, `ffn` is the
  last token that RWKV-7's channel mix read.

  Where the levels' weights are given (`cms.GivenState`) a call returns as `cms`
  what they read, the residual stream [B, T, D].
  """

  mixer: Any
  cms: Any
  ffn: Any = None


def init_state(
  config: ModelConfig, batch_size: int, piece_length: int | None = None
) -> Any:
  """The state before the first token: a block's, or a tuple of a turn's."""
  turn = pattern(config)
  if len(turn) > 1:
    return tuple(init_state(one, batch_size, piece_length) for one in turn)
  _, mixer_state = SEQUENCE_LAYERS[config.sequence_layer]
  return BlockState(
    mixer=mixer_state(config, batch_size, piece_length),
    cms=cms.init_state(config, batch_size, piece_length),
    ffn=rwkv7.init_shift(config, batch_size) if config.is_rwkv7 else None,
  )


class Block(nn.Module):
  """One layer; returns (x, state) so that `nn.scan` can stack it.

  RWKV-7's x is (x, `rwkv7.Depth`).  `half` stops before the FFN or CMS.
  """

  config: ModelConfig
  half: bool = False

  @nn.compact
  def __call__(
    self,
    x_BTD: Any,
    state: BlockState | None,
    segments: jax.Array | None,
  ) -> tuple[Any, BlockState | None]:
    cfg = self.config
    depth: Any = ()
    if cfg.is_rwkv7:
      x_BTD, *depth = x_BTD
    beside = (x_BTD,) if cfg.sequence_layer in TTT_LAYERS else depth
    mixer, _ = SEQUENCE_LAYERS[cfg.sequence_layer]
    normed = layers.norm(cfg, "norm_mixer")(x_BTD)
    mixed = mixer(cfg, name="mixer")(
      normed, state.mixer if state else None, segments, *beside
    )
    x_BTD = x_BTD + mixed.y
    if self.half:
      x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", "act"))
      return x_BTD, BlockState(mixed.state, {}) if state else None
    cms_state: Any = {}
    ffn_state, stream_BTD = state.ffn if state else None, x_BTD
    if cfg.cms.levels:
      x_BTD, cms_state = cms.ContinuumMemory(cfg, name="cms")(
        x_BTD, mixed, state.cms if state else None, segments
      )
    elif cfg.ffn_hidden:
      normed = layers.norm(cfg, "norm_ffn")(x_BTD)
      if cfg.is_rwkv7:
        y_BTD, ffn_state = rwkv7.ChannelMix(cfg, name="ffn")(
          normed, ffn_state, segments, depth[0].layer
        )
      else:
        y_BTD = layers.SwiGLU(cfg, cfg.ffn_hidden, name="ffn")(normed)
      x_BTD = x_BTD + y_BTD
    x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", "act"))
    if state is not None:
      is_given = cms.is_given(state.cms)
      cms_state = stream_BTD if is_given else cms_state
      state = BlockState(mixed.state, cms_state, ffn_state)
    if cfg.is_rwkv7:
      return (x_BTD, depth[0].after(mixed.values)), state
    return x_BTD, state


class Turn(nn.Module):
  """The blocks of a pattern, one after the other; the state has one of each."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: tuple[BlockState, ...] | None,
    segments: jax.Array | None,
  ) -> tuple[jax.Array, tuple[Any, ...] | None]:
    after = []
    for i, config in enumerate(pattern(self.config)):
      block = Block(config, name=f"block_{i}")
      x_BTD, one = block(x_BTD, state[i] if state else None, segments)
      after.append(one)
    return x_BTD, tuple(after) if state else None
