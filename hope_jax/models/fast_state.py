"""Fast state of a whole model: its levels, and operations on them.

There are three kinds of state: *slow* (the parameters, which the outer
optimizer changes), *fast* (what a model keeps of the sequences that it reads,
defined here) and *run* (`training/step.TrainState`: step, optimizer, counters).

The fast state is a `BlockState` with layers on axis 0 or, where CMS levels
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
    mixer: the sequence layer's state.
    cms: `chunks.ChunkState` of every fast level, by name.
    ffn: the last token that RWKV-7's channel mix read.
    given: `models/cms.GivenLevel` by name, where levels learn elsewhere.
    stream: [B, T, D] the CMS's input; returned only where levels are given.
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
    """The state with one CMS level reset to its start."""
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
  """`fast` with the levels `names` reset to their start: D and S are zero.

  What they have learned in an incomplete chunk is dropped, too, but the chunk
  still ends where it would have ended (levels with the next-token signal do
  learn from all tokens that are pending).  Convolutions and attention keep what
  they have seen, except that Titans MAC forgets its segment with its memory.
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
  """|D| / |M_0| of every fast level: the median over layers of the medians over
  rows and heads."""
  changes = {}
  for name, level in levels(params, fast, config).items():
    by_layer = jax.vmap(dynamics.relative_change)(level.start, level.weight)
    changes[name] = float(jnp.median(by_layer))
  return changes


def _is_chunk_state(x: Tree) -> bool:
  return isinstance(x, ChunkState)


def at_border(fast: Tree, like: Tree) -> Tree:
  """Drops the position in the chunk of those levels that `like`, a state of the
  same model, keeps at chunk borders."""

  def convert(level: Tree, like: Tree) -> Tree:
    if not _is_chunk_state(level) or like.position is not None:
      return level
    return ChunkState(level.now, None, None)

  return jax.tree.map(convert, fast, like, is_leaf=_is_chunk_state)


def anywhere(fast: Tree, before: Tree) -> Tree:
  """Inverse of `at_border`, where `fast` is `before` after whole chunks."""

  def convert(old: Tree, level: Tree) -> Tree:
    if not _is_chunk_state(level) or level.position is not None:
      return level
    return ChunkState(level.now, level.now.weight, old.position)

  return jax.tree.map(convert, before, fast, is_leaf=_is_chunk_state)
