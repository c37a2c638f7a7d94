"""Scalars that describe how a memory learns inside a sequence.

Legend: B batch, H heads, N chunks, C chunk length.
"""

import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree


def mean(x: jax.Array, live: jax.Array | None) -> jax.Array:
  """Mean of x over the places [..., C] that hold a token."""
  if live is None:
    return jnp.mean(x)
  count = jnp.sum(live) * (x.size // live.size)
  return jnp.sum(jnp.where(live, x, 0)) / count


def half_life(retention: jax.Array, live: jax.Array | None = None) -> jax.Array:
  """Median number of tokens after which half of a memory is forgotten."""
  tokens = jnp.log(0.5) / jnp.minimum(jnp.log(retention), -1e-9)
  if live is None:
    return jnp.median(tokens)
  return jnp.nanmedian(jnp.where(live, tokens, jnp.nan))


def loss_dynamics(
  before: jax.Array,
  after: jax.Array,
  targets: jax.Array,
  loss_factor: float,
  error_clip: float,
  *,
  is_dot: bool = False,
  live: jax.Array | None = None,
) -> dict[str, jax.Array]:
  """Inner loss of a chunk at the states before and after it, and the clip rate.

  `is_dot`: the loss is -2 loss_factor <M(k), target>, not the squared distance.
  """

  def loss(outputs):
    if is_dot:
      return -2.0 * jnp.sum(outputs * targets, axis=-1)
    return jnp.sum(jnp.square(outputs - targets), axis=-1)

  error = targets if is_dot else before - targets
  norm = 2.0 * loss_factor * jnp.linalg.norm(error, axis=-1)
  return {
    "loss_before": loss_factor * mean(loss(before), live),
    "loss_after": loss_factor * mean(loss(after), live),
    "clip_rate": mean(norm > (error_clip or jnp.inf), live),
  }


def relative_change(initial: Tree, weight: Tree, is_whole: bool = False):
  """Median over batch (and heads) of |D| / |M_0|, each over all matrices.

  `is_whole`: `weight` is M_0 + D, not D.
  """
  change = weight
  if is_whole:
    change = jax.tree.map(lambda w, m: w - m[None], weight, initial)

  def square(tree):
    squares = [
      jnp.sum(jnp.square(w), axis=(-2, -1)) for w in jax.tree.leaves(tree)
    ]
    return sum(squares[1:], squares[0])

  return jnp.median(jnp.sqrt(square(change) / square(initial)[None]))


def summarize(dynamics: dict[str, Tree]) -> dict[str, Tree]:
  """Scalars per chunk [N] -> their mean, or the last of `relative_change`."""
  return {
    name: summarize(x)
    if isinstance(x, dict)
    else x[-1]
    if name == "relative_change"
    else jnp.mean(x)
    for name, x in dynamics.items()
  }
