"""AdamW with warm-up, cosine decay, clipping and two learning-rate groups.

Parameters are told apart by the names on their path, see `group` and
`is_decayed`: everything of a memory that is meta-learned (its initial state,
its gates) has a learning rate of its own, and none of it is decayed.

CMS levels slower than a sequence (paper section 7) are groups of their own.
After every n training steps such a level takes one AdamW step from the mean of
their gradients, each clipped with its own step's; in between neither its
weights nor its moments change.  The paper sums these gradients: but for `eps`
Adam's step is the same.  Steps that are skipped count for none of this, as the
optimizer's state stays as it was.
"""

import functools
import re
import types
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import optax

from hope_jax.config import OptConfig

MEMORY_NAMES = ("initial", "gates", "learn_rate")
NO_DECAY_NAMES = ("norm", "conv")
CMS_LEVEL = re.compile(r"(?:^|/)cms/(?:level|norm|share)_(\d+)(?:/|$)")
NO_PERIODS: Mapping[int, int] = types.MappingProxyType({})


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
  """Names of the dictionary keys of a pytree path."""
  return tuple(str(getattr(key, "key", key)) for key in path)


def group(
  path: tuple[Any, ...], periods: Mapping[int, int] = NO_PERIODS
) -> str:
  """`memory` for what memories start from and what opens them, else `base`; for
  a CMS level of `periods` that changes every n steps, `every_n`."""
  names = path_names(path)
  if set(MEMORY_NAMES) & set(names):
    return "memory"
  number = CMS_LEVEL.search("/".join(names))
  steps = periods.get(int(number[1]), 1) if number else 1
  return "base" if steps == 1 else _every(steps)


def _every(steps: int) -> str:
  return f"every_{steps}"


def is_decayed(path: tuple[Any, ...], value: jax.Array) -> bool:
  """Whether weight decay applies: to the matrices of the `base` group.

  Not to convolutions, norms and other vectors; a vector of a scanned block
  has two axes, the first of which is the layer.
  """
  names = path_names(path)
  if group(path) == "memory" or value.ndim - ("blocks" in names) < 2:
    return False
  return not any(name.startswith(NO_DECAY_NAMES) for name in names)


def decay_mask(params: Any) -> Any:
  """`is_decayed` of every parameter."""
  return jax.tree_util.tree_map_with_path(is_decayed, params)


def groups(params: Any, periods: Mapping[int, int] = NO_PERIODS) -> Any:
  """`group` of every parameter."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: group(path, periods), params
  )


def schedule(config: OptConfig, steps: int) -> optax.Schedule:
  """Linear from 0 over `warmup_steps`, then a cosine down to `steps`.

  Runs shorter than twice the warm-up spend half of their steps on it.

  Update number s (from 0) uses schedule(s + 1), so that the first update is
  not wasted on rate 0.
  """
  warmup = min(config.warmup_steps, steps // 2)
  cosine = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.peak_lr,
    warmup_steps=warmup,
    decay_steps=steps,
    end_value=config.peak_lr * config.end_lr_ratio,
  )
  return lambda count: cosine(count + 1)


def make(
  config: OptConfig, steps: int, periods: Mapping[int, int] = NO_PERIODS
) -> optax.GradientTransformation:
  """The optimizer; clipping sees the gradient of all groups together.

  periods: CMS level -> training steps between its updates; 1 if it has none.
  """
  rate = schedule(config, steps)

  def adamw(ratio: float, every: int = 1) -> optax.GradientTransformation:
    # Its update number `count`, from 0, ends `every` training steps.
    return optax.adamw(
      lambda count: ratio * rate((count + 1) * every - 1),
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=decay_mask,
    )

  transforms: dict[Hashable, optax.GradientTransformation] = {
    "base": adamw(1.0),
    "memory": adamw(config.memory_lr_ratio),
  }
  for every in sorted(set(periods.values()) - {1}):
    seldom = optax.MultiSteps(adamw(1.0, every), every, use_grad_mean=True)
    transforms[_every(every)] = seldom.gradient_transformation()
  optimizer = optax.partition(
    transforms, functools.partial(groups, periods=periods)
  )
  if not config.clip_norm:
    return optimizer
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def state_shardings(
  optimizer: optax.GradientTransformation,
  state: Any,
  of_params: Any,
  of_rest: Any,
) -> Any:
  """Shardings of an optimizer state: moments lie where parameters do."""

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
