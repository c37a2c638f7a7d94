"""The interface of sequence layers, for the block and everything above it.

A sequence layer is a Linen module with
`__call__(x_BTD, state, documents) -> MixerOutput`, together with the functions
`init_state(config, batch_size, read_size) -> FastState` and
`describe(config) -> [Problem]`.  Without a state it starts a sequence and
returns no state; with a state it continues a sequence.  Training, prefill,
decoding and sessions are therefore one code path.  `models/registry.py` lists
all sequence layers.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import flax.struct
import jax
from flax.typing import ArrayPytree as Tree

from hope_jax.config import ModelConfig

Self = TypeVar("Self", bound="FastState")


class MixerOutput(NamedTuple):
  """The output y [B, T, D]; keys and values k_t, v_t for the CMS, [B, T, D]
  (heads side by side) in layers that may have a CMS; the new state."""

  y: jax.Array
  keys: jax.Array
  values: jax.Array
  state: Tree


class Level(NamedTuple):
  """A fast level: its learned start M_0 [...], its difference D and momentum S
  (None without) [B, ...], each a tree of matrices.  An axis of layers may come
  first."""

  start: Tree
  weight: Tree
  momentum: Tree


# Pairs (components, the part of a state that they share equally).
Parts = Iterator[tuple[tuple[str, ...], Tree]]


@flax.struct.dataclass
class FastState:
  """What a layer keeps of the sequences that it reads; arrays are [B, ...].

  A field is a `FastState` itself, or a tree of arrays declared with `owned`.
  """

  def parts(self, config: ModelConfig) -> Parts:
    """The whole state, by the components that share each part equally."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, FastState):
        yield from value.parts(config)
      else:
        yield (field.metadata["owner"],), value

  def fast_levels(
    self, initial: Mapping[str, Tree], config: ModelConfig
  ) -> dict[str, Level]:
    """The fast levels by name; `initial` are the slow parameters of M_0."""
    del initial, config
    return {}

  def reset(self: Self, level: str, config: ModelConfig) -> Self:
    """The state with one fast level reset to its start, D = 0."""
    del config
    raise KeyError(level)


def owned(owner: str, **options: Any) -> Any:
  """A field of a `FastState` that belongs to a component of the model.

  `options` are those of `dataclasses.field`.
  """
  return flax.struct.field(metadata={"owner": owner}, **options)


class Problem(NamedTuple):
  """A component of the model as an optimization problem of its own (paper
  section 3, definitions 3 and 4).

  Attributes:
    name: the component's, such as `memory`, `k` or `cms_0`.
    frequency: updates per token of a sequence; `math.inf`: non-parametric.
    context: the stream from which it learns.
    objective, rule: what it minimises, and how.
    transfer: how it exchanges knowledge with other components (section 3.3).
  """

  name: str
  frequency: Fraction | float
  context: str
  objective: str
  rule: str
  transfer: str


# Phrases that several `Problem`s share.
META_LEARNED = "start meta-learned by backpropagation"
OUTER_LOSS = "cross entropy of the next token"
