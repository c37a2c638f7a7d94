"""What an optimizer has to know of a parameter: its role travels with it.

  role     what it is                                     group   decayed
  weight   a matrix of a linear map; a vector beside it   base    matrices
  norm     scale or bias of a norm                        base    no
  conv     kernel or bias of a short convolution          base    no
  gate     opens, scales or closes a memory               memory  no
  initial  what a memory starts from (M_0)                memory  no
  rate     a learned rate of a CMS level                  memory  no

The groups are those of learning rates, `optim/registry.py`.
"""

import dataclasses
from typing import Literal

Role = Literal["weight", "norm", "conv", "gate", "initial", "rate"]
META_LEARNED: tuple[Role, ...] = ("gate", "initial", "rate")


@dataclasses.dataclass(frozen=True)
class Kind:
  """A parameter's role, and what it is part of; a leaf of trees.

  Attributes:
    role: see the module.
    owner: the components of the nested system that share it, in equal parts.
    ndim: its number of axes, without the one of stacked layers.
  """

  role: Role
  owner: tuple[str, ...]
  ndim: int

  @property
  def is_meta_learned(self) -> bool:
    """Whether it makes or opens a memory that learns inside the sequence."""
    return self.role in META_LEARNED

  @property
  def is_decayed(self) -> bool:
    """Whether weight decay applies: to matrices."""
    return self.role == "weight" and self.ndim >= 2
