"""An optimizer's state, described as associative memories (paper section 4)."""

from typing import NamedTuple


class Moment(NamedTuple):
  """One state of an optimizer that compresses the gradients of past steps.

  Attributes:
    field: its name in optax's state.
    objective: what it minimises, as a function of a step's gradient g.
    rule: how a step changes it.
  """

  field: str
  objective: str
  rule: str
