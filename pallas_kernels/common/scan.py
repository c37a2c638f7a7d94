"""Scans over chunks whose backward pass recomputes instead of storing.

A scan over N chunks saves N states for its backward pass. For fast weights the
state is far larger than a chunk's tokens, so the states are recomputed:
`checkpointed_scan` stores O(sqrt(N)) of them.

Dimensions: B batch, H heads, T tokens, N chunks, C chunk length, G group.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp

Carry = TypeVar("Carry")
CheckpointPolicy = Literal["none", "chunk", "sqrt"]


def checkpointed_scan(
  body: Callable,
  carry: Carry,
  xs,
  *,
  policy: CheckpointPolicy = "sqrt",
  threshold: int = 64,
) -> tuple[Carry, Any]:
  """`jax.lax.scan(body, carry, xs)` with a choice of what is stored.

  * "none": everything the backward pass needs, as `jax.lax.scan`;
  * "chunk": the N carries; the body runs twice;
  * "sqrt": as "chunk" up to `threshold` steps. Beyond it, groups of
    G = ceil(sqrt(N)) steps: about sqrt(N) carries, and G more while one group
    is differentiated; the body runs three times. The N mod G steps that fill
    no group follow in a scan of their own.

  Values and gradients do not depend on the policy.
  """
  if policy not in get_args(CheckpointPolicy):
    raise ValueError(
      f"{policy=} is not one of {', '.join(get_args(CheckpointPolicy))}."
    )
  leaves = jax.tree.leaves(xs)
  if not leaves:
    raise ValueError("checkpointed_scan needs at least one array in xs.")
  if policy == "none":
    return jax.lax.scan(body, carry, xs)

  step = jax.checkpoint(body, prevent_cse=False)
  num_steps = leaves[0].shape[0]
  if policy == "chunk" or num_steps <= threshold:
    return jax.lax.scan(step, carry, xs)

  group = math.ceil(math.sqrt(num_steps))
  num_grouped = num_steps // group * group

  def run_group(carry, xs):
    return jax.lax.scan(step, carry, xs)

  grouped = jax.tree.map(
    lambda leaf: leaf[:num_grouped].reshape(-1, group, *leaf.shape[1:]), xs
  )
  carry, ys = jax.lax.scan(
    jax.checkpoint(run_group, prevent_cse=False), carry, grouped
  )
  ys = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), ys)
  if num_grouped == num_steps:
    return carry, ys
  rest = jax.tree.map(lambda leaf: leaf[num_grouped:], xs)
  carry, ys_rest = jax.lax.scan(step, carry, rest)
  return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, ys_rest)


def fold_chunks(
  x: jax.Array, chunk_length: int, axis: int, *, pad_value=0
) -> jax.Array:
  """Cuts an axis into chunks: [..., T, ...] -> [..., N, C, ...].

  The last chunk is padded with `pad_value`.
  """
  axis %= x.ndim
  padding = -x.shape[axis] % chunk_length
  if padding:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, padding)
    x = jnp.pad(x, widths, constant_values=pad_value)
  return x.reshape(*x.shape[:axis], -1, chunk_length, *x.shape[axis + 1 :])


def split_chunks(
  x: jax.Array, chunk_length: int, axis: int = 2, *, pad_value=0
) -> jax.Array:
  """`fold_chunks` with the chunks first: [B,H,T,...] -> [N,B,H,C,...]."""
  folded = fold_chunks(x, chunk_length, axis, pad_value=pad_value)
  return jnp.moveaxis(folded, axis % x.ndim, 0)


def merge_chunks(x: jax.Array, length: int, axis: int = 2) -> jax.Array:
  """Inverse of `split_chunks`: [N,B,H,C,...] -> [B,H,T,...] with T = length.

  `axis` is the axis of T in the result.
  """
  axis %= x.ndim - 1
  x = jnp.moveaxis(x, 0, axis)
  x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
  return jax.lax.slice_in_dim(x, 0, length, axis=axis)
