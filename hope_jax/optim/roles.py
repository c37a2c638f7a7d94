"""A parameter's role, which tells an optimizer how to treat it.

  role     what it is                                     group   decayed
  weight   a matrix of a linear map, or its vectors       base    matrices
  norm     scale or bias of a norm                        base    no
  conv     kernel or bias of a short convolution          base    no
  gate     opens, scales or closes a memory               memory  no
  initial  what a memory starts from (M_0)                memory  no
  rate     a learned rate of a CMS level                  memory  no

The groups, each with its learning rate, are those of `optim/registry.py`.
"""

import dataclasses
from typing import Literal

Role = Literal["weight", "norm", "conv", "gate", "initial", "rate"]
META_LEARNED: tuple[Role, ...] = ("gate", "initial", "rate")


@dataclasses.dataclass(frozen=True)
class Kind:
  """A parameter's role, and the components that it is part of.

  Attributes:
    role: see the module.
    owner: the components of the nested system that share it, in equal parts.
    ndim: its number of axes, without the axis of stacked layers.
  """

  role: Role
  owner: tuple[str, ...]
  ndim: int

  @property
  def is_meta_learned(self) -> bool:
    """Whether it is the start, a gate or a rate of a memory or level."""
    return self.role in META_LEARNED

  @property
  def is_decayed(self) -> bool:
    """Whether weight decay applies, as it does to matrices of linear maps."""
    return self.role == "weight" and self.ndim >= 2
