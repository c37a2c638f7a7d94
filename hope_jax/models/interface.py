"""What every sequence layer is, to the block and to everything above it.

A sequence layer is a Linen module with
`__call__(x_BTD, state, documents) -> MixerOutput` and, beside it, the functions
`init_state(config, batch_size, read_size) -> FastState` and
`describe(config) -> [Problem]`.  Without a state it starts a sequence and
returns none; with a state it continues one, so that training, prefill, decoding
and sessions are one code path.  `models/registry.py` lists them all.
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
  """y [B, T, D]; its keys and values k_t, v_t [B, T, D] for the CMS (heads
  side by side); the new state."""

  y: jax.Array
  keys: jax.Array
  values: jax.Array
  state: Tree


class Level(NamedTuple):
  """A fast level: its learned start M_0 [...], its difference D and momentum S
  [B, ...] (S None without), each any tree of matrices; layers may lie first."""

  start: Tree
  weight: Tree
  momentum: Tree


# What a state holds: components, and what they share in equal parts.
Parts = Iterator[tuple[tuple[str, ...], Tree]]


@flax.struct.dataclass
class FastState:
  """What a layer keeps of the sequences that it reads, [B, ...] each.

  Fields are states themselves, or trees of arrays made with `owned`.
  """

  def parts(self, config: ModelConfig) -> Parts:
    """All that is kept, by the components that share it in equal parts."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, FastState):
        yield from value.parts(config)
      else:
        yield (field.metadata["owner"],), value

  def fast_levels(
    self, initial: Mapping[str, Tree], config: ModelConfig
  ) -> dict[str, Level]:
    """Its fast levels by name; `initial`: the slow parameters of M_0."""
    del initial, config
    return {}

  def reset(self: Self, level: str, config: ModelConfig) -> Self:
    """The state in which a fast level is as at the start, D = 0."""
    del config
    raise KeyError(level)


def owned(owner: str, **options: Any) -> Any:
  """A field of a `FastState` that belongs to a component of the model.

  `options` are those of `dataclasses.field`.
  """
  return flax.struct.field(metadata={"owner": owner}, **options)


class Problem(NamedTuple):
  """A component of the model as a problem of its own (paper section 3,
  definitions 3 and 4).

  Attributes:
    name: of the component, `memory`, `k`, `cms_0` ...
    frequency: updates per token of a sequence; `math.inf`: non-parametric.
    context: the stream that it learns from.
    objective, rule: what it minimises, and how.
    transfer: how it exchanges knowledge with other components (section 3.3).
  """

  name: str
  frequency: Fraction | float
  context: str
  objective: str
  rule: str
  transfer: str


# What the texts of a `Problem` have in common.
META_LEARNED = "start meta-learned by backpropagation"
OUTER_LOSS = "cross entropy of the next token"
