"""AdamW with warm-up, cosine decay, clipping and two learning-rate groups.

Parameters are told apart by the names on their path, see `group` and
`is_decayed`: everything of a memory that is meta-learned (its initial state,
its gates) has a learning rate of its own, and none of it is decayed.
"""

from typing import Any

import jax
import optax

from hope_jax.config import OptConfig

MEMORY_NAMES = ("initial", "gates", "learn_rate")
NO_DECAY_NAMES = ("norm", "conv")


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
  """Names of the dictionary keys of a pytree path."""
  return tuple(str(getattr(key, "key", key)) for key in path)


def group(path: tuple[Any, ...]) -> str:
  """`memory` for what memories start from and what opens them, else `base`."""
  names = path_names(path)
  return "memory" if set(MEMORY_NAMES) & set(names) else "base"


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


def groups(params: Any) -> Any:
  """`group` of every parameter."""
  return jax.tree_util.tree_map_with_path(lambda path, _: group(path), params)


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


def make(config: OptConfig, steps: int) -> optax.GradientTransformation:
  """The optimizer; clipping sees the gradient of all groups together."""
  rate = schedule(config, steps)

  def adamw(ratio: float) -> optax.GradientTransformation:
    return optax.adamw(
      lambda count: ratio * rate(count),
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=decay_mask,
    )

  optimizer = optax.partition(
    {"base": adamw(1.0), "memory": adamw(config.memory_lr_ratio)}, groups
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
