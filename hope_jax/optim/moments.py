"""What an optimizer remembers, told as a memory (paper section 4)."""

from typing import NamedTuple


class Moment(NamedTuple):
  """One state of an optimizer that compresses the gradients of past steps.

  Attributes:
    field: the name of the state's field, as in optax's own states.
    objective: what it minimises, in the gradient g of a step.
    rule: how a step changes it.
  """

  field: str
  objective: str
  rule: str
