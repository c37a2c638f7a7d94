"""Work that every device does on its own rows, or heads, of a batch.

Legend: B batch, H heads, T tokens.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, PartitionSpec


def _mesh() -> Any:
  """The mesh to split work over; None where there is one device only, or where
  this already is the work of one of them."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
    return None
  return mesh


def _ways(mesh: Any, axis: Any) -> int:
  """Over how many devices a mesh axis, or several, splits an array."""
  names = axis if isinstance(axis, tuple) else (axis,)
  return math.prod(mesh.shape[name] for name in names if name is not None)


def by_rows(run: Callable) -> Callable:
  """`run(shared, rows, state)` by every device on its rows, for loops inside
  which devices are not to talk.

  The axes of the batch split the rows; those of heads do, too, where they
  divide what is left.  `shared` is gathered whole on every device, before, and
  its gradient is summed over them, after; `rows` are [B, ...], `state` is
  [layers, B, ...] or without B.  `run` returns (rows, state, state).
  """
  mesh = _mesh()
  if mesh is None:
    return run

  def spec(tree: Any, split: Any, place: int) -> Any:
    one = PartitionSpec(*(None,) * place, split)
    return jax.tree.map(
      lambda x: one if x.ndim > place else PartitionSpec(), tree
    )

  def sharded(shared: Any, rows: Any, state: Any) -> Any:
    count, split = len(jax.tree.leaves(rows)[0]), ()
    for axis in nn.logical_to_mesh_axes(("batch", "heads")) or ():
      names = axis if isinstance(axis, tuple) else (axis,)
      names = (*split, *(name for name in names if name is not None))
      if count % _ways(mesh, names) == 0:
        split = names

    def local(shared: Any, rows: Any, state: Any) -> Any:
      with nn.logical_axis_rules(()):  # nothing is split any more
        return run(shared, rows, state)

    shapes = jax.eval_shape(run, shared, rows, state)
    out = spec(shapes[0], split, 0), *(spec(x, split, 1) for x in shapes[1:])
    return jax.shard_map(
      local,
      in_specs=(PartitionSpec(), spec(rows, split, 0), spec(state, split, 1)),
      out_specs=out,
      check_vma=False,
    )(shared, rows, state)

  return sharded
