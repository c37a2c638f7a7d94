"""The optimizers by name (`opt.name`), and their groups of parameters.

Every optimizer is used in the same way: gradients are clipped by their global
norm, and parameters fall into groups by their kind (`optim/roles.py`):

  base      slow weights
  memory    the meta-learned parameters of memories (initial states, gates and
            rates), with their own learning rate (`opt.memory_lr_ratio`)
  every_n   a CMS level that is slower than a sequence (paper section 7)

A level of `every_n` takes one step of the optimizer after every n training
steps, from the mean of their gradients, each of which is clipped together with
the other gradients of its training step; in between neither its weights nor its
moments change.  The paper sums these gradients, with which Adam's step is the
same but for `eps`.  Skipped training steps do not count, since they leave the
optimizer's state unchanged.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from flax.typing import ArrayPytree as Tree

from hope_jax.config import OptConfig
from hope_jax.optim import adamw, schedules
from hope_jax.optim.moments import Moment
from hope_jax.optim.roles import Kind


class Optimizer(NamedTuple):
  """How an optimizer is made and described.

  Attributes:
    title: its name in texts.
    transform: (config, rate, is_decayed) -> the update of one group, `rate` a
      schedule over its updates, `is_decayed` a tree of bools.
    schedule: (config, steps) -> the learning rate of the group `base`.
    describe: config -> how its state compresses past gradients.
  """

  title: str
  transform: Callable[
    [OptConfig, optax.Schedule, Any], optax.GradientTransformation
  ]
  schedule: Callable[[OptConfig, int], optax.Schedule]
  describe: Callable[[OptConfig], tuple[Moment, ...]]


OPTIMIZERS: dict[str, Optimizer] = {
  "adamw": Optimizer(
    "AdamW", adamw.transform, schedules.warmup_cosine, adamw.describe
  ),
}


def group(kind: Kind, periods: Mapping[str, int]) -> str:
  """The group of a parameter: `base`, `memory` or `every_n`.

  `periods`: training steps between the updates of a component, by its name.
  """
  steps = max(periods.get(name, 1) for name in kind.owner)
  if steps > 1:
    return _every(steps)
  return "memory" if kind.is_meta_learned else "base"


def _every(steps: int) -> str:
  return f"every_{steps}"


def groups(kinds: Tree, periods: Mapping[str, int]) -> Any:
  """`group` of every parameter."""
  return jax.tree.map(lambda kind: group(kind, periods), kinds)


def decay_mask(kinds: Tree) -> Any:
  """For every parameter, whether weight decay applies to it."""
  return jax.tree.map(lambda kind: kind.is_decayed, kinds)


def make(
  config: OptConfig,
  steps: int,
  kinds: Tree,
  periods: Mapping[str, int],
) -> optax.GradientTransformation:
  """The optimizer of a run of `steps` training steps.

  Args:
    kinds: `Kind` of every parameter, a tree like the parameters.
    periods: see `group`.
  """
  optimizer = OPTIMIZERS[config.name]
  rate, mask = optimizer.schedule(config, steps), decay_mask(kinds)

  def of_group(ratio: float, every: int = 1) -> optax.GradientTransformation:
    # Update `count`, from 0, uses the rate of the last of its training steps.
    of_update = lambda count: ratio * rate((count + 1) * every - 1)
    return optimizer.transform(config, of_update, mask)

  transforms: dict[Hashable, optax.GradientTransformation] = {
    "base": of_group(1.0),
    "memory": of_group(config.memory_lr_ratio),
  }
  for every in sorted(set(periods.values()) - {1}):
    seldom = optax.MultiSteps(of_group(1.0, every), every, use_grad_mean=True)
    transforms[_every(every)] = seldom.gradient_transformation()
  partition = optax.partition(transforms, groups(kinds, periods))
  if not config.clip_norm:
    return partition
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), partition)


def schedule(config: OptConfig, steps: int) -> optax.Schedule:
  """The learning rate of the group `base`, by training step."""
  return OPTIMIZERS[config.name].schedule(config, steps)


def state_shardings(
  optimizer: optax.GradientTransformation,
  state: Tree,
  of_params: Tree,
  of_rest: Tree,
) -> Any:
  """Shardings of an optimizer state: those of parameters for their moments."""

  def is_other_group(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)

  return optax.tree_map_params(
    optimizer,
    lambda moment, sharding: moment if is_other_group(moment) else sharding,
    state,
    of_params,
    transform_non_params=lambda _: of_rest,
    is_leaf=is_other_group,
  )
