"""The optimizer group of the configuration."""

import dataclasses
from typing import Literal

from hope_jax.config.fields import check


@dataclasses.dataclass(frozen=True)
class OptConfig:
  """The optimizer, with warm-up, cosine decay and two learning-rate groups.

  Attributes:
    name: a key of `OPTIMIZERS` in `optim/registry.py`.
    peak_lr, end_lr_ratio: cosine from peak_lr to end_lr_ratio * peak_lr.
    warmup_steps: steps of linear warm-up from 0, at most half of the run.
    memory_lr_ratio: learning rate of the memories' initial states, gates and
      rates, relative to the rest.
    clip_norm: largest global norm of the gradient; 0 does not clip.
  """

  name: Literal["adamw"] = "adamw"
  peak_lr: float = 1e-3
  end_lr_ratio: float = 0.1
  warmup_steps: int = 50
  weight_decay: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  clip_norm: float = 1.0
  memory_lr_ratio: float = 1.0

  def __post_init__(self):
    check(self, "opt", ("peak_lr", "eps"), ("b1", "b2"))
