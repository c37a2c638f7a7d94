"""The residual block of every model: sequence layer, then FFN or CMS.

  x <- x + mixer(RMS(x));  x <- x + FFN(RMS(x))  or  x <- CMS(x)  or neither

(Paper eq. 94-97 for Hope; the baselines are the same block with another mixer
and one slow FFN level.)  `mixer` is the block's sequence layer, one of those in
`models/registry.py`.

Legend: B batch, T tokens, D model.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from flax.typing import ArrayPytree as Tree

from hope_jax.config import ModelConfig
from hope_jax.models import cms, layers
from hope_jax.models.fast_state import BlockState
from hope_jax.models.interface import MixerOutput


class Block(nn.Module):
  """One layer; returns (x, state) so that `nn.scan` can stack it.

  `half` stops before the FFN or CMS.
  """

  config: ModelConfig
  mixer: type[nn.Module]
  half: bool = False

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: BlockState | None,
    documents: jax.Array | None,
  ) -> tuple[jax.Array, BlockState | None]:
    mixed = self.mix(x_BTD, state.mixer if state else None, documents)
    x_BTD = x_BTD + mixed.y
    if state is not None:
      state = dataclasses.replace(state, mixer=mixed.state)
    if not self.half:
      x_BTD, state = self.transform(x_BTD, mixed, state, documents)
    return layers.residual(x_BTD), state

  def mix(
    self, x_BTD: jax.Array, state: Tree, documents: jax.Array | None
  ) -> MixerOutput:
    """The sequence layer's output for the normalised stream."""
    normed = layers.rms_norm(self.config, "norm_mixer")(x_BTD)
    mixer: Any = self.mixer(self.config, name="mixer")
    return mixer(normed, state, documents)

  def transform(
    self,
    x_BTD: jax.Array,
    mixed: MixerOutput,
    state: BlockState | None,
    documents: jax.Array | None,
  ) -> tuple[jax.Array, BlockState | None]:
    """x after the FFN or CMS, and the block's new state."""
    cfg = self.config
    if cfg.cms.levels:
      return cms.ContinuumMemory(cfg, name="cms")(
        x_BTD, mixed, state, documents
      )
    if cfg.ffn_hidden:
      normed = layers.rms_norm(cfg, "norm_ffn")(x_BTD)
      x_BTD = x_BTD + layers.SwiGLU(cfg, cfg.ffn_hidden, name="ffn")(normed)
    return x_BTD, state
