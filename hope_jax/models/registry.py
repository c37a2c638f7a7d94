"""The sequence layers of all models by name, and the stack of their blocks.

A model is a row here, a row of traits in `config/layers.py`, and its own file.
Its blocks are all alike, or blocks of a few kinds alternate, as in Samba
(2406.07522): Mamba, FFN, attention with a window, FFN.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax.typing import ArrayPytree as Tree

from hope_jax.config import ModelConfig
from hope_jax.config.layers import LAYERS as TRAITS
from hope_jax.models import (
  attention,
  cms,
  layers,
  linear,
  lstm,
  mamba,
  mamba2,
  problems,
  rwkv7,
  srwm,
  titans,
  titans_attention,
  ttt,
)
from hope_jax.models.block import Block
from hope_jax.models.fast_state import BlockState
from hope_jax.models.interface import Problem


def _same(config: ModelConfig, x_BTD: jax.Array) -> jax.Array:
  del config
  return x_BTD


def _normed(config: ModelConfig, x_BTD: jax.Array) -> jax.Array:
  return layers.rms_norm(config, "norm_out")(x_BTD)


class Layer(NamedTuple):
  """A kind of sequence layer, see `models/interface.py`.

  Attributes:
    module: the Linen module, a block's `mixer`.
    init_state: (config, batch size, read size) -> its `FastState`.
    describe: config -> what it learns inside the sequence.
    block: the residual block around it.
    begin: (config, embeddings) -> the input of the first block.
    end: (config, last block's output) -> the input of the map to the logits.
    init_ffn: (config, batch size) -> the state of the block's FFN, or None.
  """

  module: type[nn.Module]
  init_state: Callable[[ModelConfig, int, int | None], Tree]
  describe: Callable[[ModelConfig], Sequence[Problem]]
  block: type[nn.Module] = Block
  begin: Callable[[ModelConfig, jax.Array], Tree] = _same
  end: Callable[[ModelConfig, Tree], jax.Array] = _normed
  init_ffn: Callable[[ModelConfig, int], Tree] = lambda config, batch_size: None


_ATTENTION = Layer(
  attention.Attention, attention.init_state, attention.describe
)
_TITANS = Layer(titans.DeepMemory, titans.init_state, problems.deep_memories)
_BESIDE = Layer(
  titans_attention.MemoryAndAttention,
  titans_attention.init_state,
  titans_attention.describe,
)
_LINEAR = Layer(linear.LinearMemory, linear.init_state, linear.describe)
_TTT = Layer(ttt.TestTimeTraining, ttt.init_state, ttt.describe, ttt.TTTBlock)

LAYERS: dict[str, Layer] = {
  "transformer": _ATTENTION,
  "hope_attention": _ATTENTION,
  "titans": _TITANS,
  "titans_mac": Layer(
    titans_attention.MemoryAsContext,
    titans_attention.init_context_state,
    titans_attention.describe,
  ),
  "titans_mag": _BESIDE,
  "titans_mal": _BESIDE,
  "hope": _TITANS,
  "dla": _TITANS,
  "memora": _TITANS._replace(
    describe=functools.partial(
      problems.deep_memories, prefix="KL to the last weights, in logits "
    )
  ),
  "ttt_linear": _TTT,
  "ttt_mlp": _TTT,
  "retnet": _LINEAR,
  "deltanet": _LINEAR,
  "gated_deltanet": _LINEAR,
  "comba": _LINEAR,
  "mamba2": Layer(mamba2.Mamba2, mamba2.init_state, mamba2.describe),
  "mamba": Layer(mamba.Mamba, mamba.init_state, mamba.describe),
  "rwkv7": Layer(
    rwkv7.TimeMix,
    rwkv7.init_state,
    rwkv7.describe,
    rwkv7.RWKV7Block,
    rwkv7.begin,
    rwkv7.end,
    rwkv7.init_shift,
  ),
  "lstm": Layer(lstm.LSTM, lstm.init_state, lstm.describe),
  "srwm": Layer(srwm.SelfReferentialMatrix, srwm.init_state, srwm.describe),
}


def pattern(config: ModelConfig) -> tuple[ModelConfig, ...]:
  """A config for each of the blocks that alternate; usually a single one."""
  if len(config.blocks) == 1:
    return (config,)

  def one(name: str) -> ModelConfig:
    is_attention = TRAITS[name].attention == "alone"
    conv_window = 0 if is_attention else config.conv_window
    return dataclasses.replace(
      config, sequence_layer=name, conv_window=conv_window
    )

  return tuple(map(one, config.blocks))


def layer_of(config: ModelConfig) -> Layer:
  """The kind of sequence layer in the model's first block."""
  return LAYERS[config.blocks[0]]


def make_block(config: ModelConfig, **options: Any) -> nn.Module:
  """A block of the first kind; `options` are fields of `Block`."""
  layer = layer_of(config)
  return layer.block(config, layer.module, **options)


def init_state(
  config: ModelConfig, batch_size: int, read_size: int | None = None
) -> Tree:
  """The state before the first token; a tuple if several blocks alternate."""
  turn = pattern(config)
  if len(turn) > 1:
    return tuple(init_state(one, batch_size, read_size) for one in turn)
  layer = layer_of(config)
  return BlockState(
    mixer=layer.init_state(config, batch_size, read_size),
    cms=cms.init_state(config, batch_size, read_size),
    ffn=layer.init_ffn(config, batch_size),
  )


def describe(config: ModelConfig) -> list[Problem]:
  """What the sequence layers of all kinds learn inside the sequence."""
  turn = pattern(config)
  return [p for one in turn for p in LAYERS[one.sequence_layer].describe(one)]


class Turn(nn.Module):
  """The blocks of a pattern in sequence; the state is a tuple of theirs."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: tuple[BlockState, ...] | None,
    documents: jax.Array | None,
  ) -> tuple[jax.Array, tuple[Tree, ...] | None]:
    after = []
    for i, config in enumerate(pattern(self.config)):
      layer = LAYERS[config.sequence_layer]
      block: Any = layer.block(config, layer.module, name=f"block_{i}")
      x_BTD, one = block(x_BTD, state[i] if state else None, documents)
      after.append(one)
    return x_BTD, tuple(after) if state else None


def stack(config: ModelConfig) -> tuple[type[nn.Module], tuple[Tree, ...]]:
  """The module that is repeated along the model's depth, and its arguments."""
  if len(config.blocks) > 1:
    return Turn, (config,)
  layer = layer_of(config)
  return layer.block, (config, layer.module)
