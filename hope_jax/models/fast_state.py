"""Fast state of a whole model: its levels, and what may be done with them.

Three kinds of state are told apart: *slow* (the parameters, which the outer
optimizer changes), *fast* (what a model keeps of the sequences that it reads:
here) and *run* (`training/step.TrainState`: step, optimizer, counters).

The fast state is a `BlockState` with layers on axis 0, or, where CMS levels
learn from the model's own loss, a `NextTokenState`.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree

from hope_jax.config import ModelConfig
from hope_jax.memory import dynamics
from hope_jax.memory.chunks import ChunkState
from hope_jax.memory.cms import LevelWeights
from hope_jax.models.interface import FastState, Level, Parts, owned


@flax.struct.dataclass
class BlockState(FastState):
  """Fast state of one block.

  Attributes:
    mixer: the sequence layer's.
    cms: `chunks.ChunkState` of every fast level, by name.
    ffn: the last token that RWKV-7's channel mix read.
    given: `models/cms.GivenLevel` by name, where levels learn elsewhere.
    stream: [B, T, D] what the CMS read; returned where levels are given.
  """

  mixer: Tree
  cms: Tree
  ffn: Tree = owned("ffn", default=None)
  given: Tree = None
  stream: Tree = None

  def parts(self, config: ModelConfig) -> Parts:
    """See `FastState`."""
    yield from self.mixer.parts(config)
    yield from (((name,), level) for name, level in self.cms.items())
    yield ("ffn",), self.ffn

  def cms_weight(self, name: str) -> LevelWeights:
    """D of a CMS level."""
    return self.cms[name].now.weight

  def reset_cms(self, name: str) -> "BlockState":
    """The state in which a CMS level is as at the start."""
    return dataclasses.replace(
      self, cms=self.cms | {name: self.cms[name].reset()}
    )


def levels(params: Tree, fast: Tree, config: ModelConfig) -> dict[str, Level]:
  """Every fast level by name, layers on axis 0, fastest first."""
  found = {}
  if not config.fast_levels:
    return found
  blocks = params["blocks"]
  initial = blocks["mixer"].get("initial", {})
  found.update(fast.mixer.fast_levels(initial, config))
  for number in range(len(config.cms.fast_lengths)):
    name = f"cms_{number}"
    weight = fast.cms_weight(name)
    slow = blocks["cms"].get(f"level_{number}") or blocks["cms"]["levels"]
    # The layers that learn are the last ones.
    start = {
      part: slow[part][-len(x) :] for part, x in weight._asdict().items()
    }
    found[name] = Level(type(weight)(**start), weight, None)
  return found


def reset(fast: Tree, names: Sequence[str], config: ModelConfig) -> Tree:
  """`fast` in which the levels `names` are as at the start: D and S are zero.

  What they have of a chunk that is not complete is zero, too; the chunk ends
  where it would have ended (what levels with the next-token signal learn there,
  they learn from all of it).  Convolutions and attention keep what they have
  seen.
  """
  for name in names:
    if name.startswith("cms_"):
      fast = fast.reset_cms(name)
    else:
      fast = dataclasses.replace(fast, mixer=fast.mixer.reset(name, config))
  return fast


def relative_change(
  params: Tree, fast: Tree, config: ModelConfig
) -> dict[str, float]:
  """|D| / |M_0| of every fast level, median over layers, rows and heads."""
  changes = {}
  for name, level in levels(params, fast, config).items():
    by_layer = jax.vmap(dynamics.relative_change)(level.start, level.weight)
    changes[name] = float(jnp.median(by_layer))
  return changes


def _is_chunk_state(x: Tree) -> bool:
  return isinstance(x, ChunkState)


def at_border(fast: Tree, like: Tree) -> Tree:
  """Drops the place within the chunk of levels that `like`, a state of the same
  model, keeps at chunk borders."""

  def convert(level: Tree, like: Tree) -> Tree:
    if not _is_chunk_state(level) or like.position is not None:
      return level
    return ChunkState(level.now, None, None)

  return jax.tree.map(convert, fast, like, is_leaf=_is_chunk_state)


def anywhere(fast: Tree, before: Tree) -> Tree:
  """Inverse of `at_border`: `fast` followed `before`, at whole chunks."""

  def convert(old: Tree, level: Tree) -> Tree:
    if not _is_chunk_state(level) or level.position is not None:
      return level
    return ChunkState(level.now, level.now.weight, old.position)

  return jax.tree.map(convert, before, fast, is_leaf=_is_chunk_state)
