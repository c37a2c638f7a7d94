"""Work that every device does on its own rows, or heads, of a batch.

Legend: B batch, H heads, T tokens.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.typing import ArrayPytree as Tree
from jax.sharding import AxisType, PartitionSpec


def _mesh() -> Tree:
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


def by_rows(run: Callable, results: Callable[[Tree, Tree], Tree]) -> Callable:
  """`run(shared, rows, state)` by every device on its rows, for loops inside
  which devices are not to talk.

  The axes of the batch split the rows; those of heads do, too, where they
  divide what is left.  `shared` is gathered whole on every device, before, and
  its gradient is summed over them, after; `rows` are [B, ...], `state` is
  [layers, B, ...] or without B.

  Args:
    results: (how rows are split, how `state` is) -> how the results are.
  """
  mesh = _mesh()
  if mesh is None:
    return run

  def sharded(shared: Tree, rows: Tree, state: Tree) -> Tree:
    count, split = len(jax.tree.leaves(rows)[0]), ()
    for axis in nn.logical_to_mesh_axes(("batch", "heads")) or ():
      names = axis if isinstance(axis, tuple) else (axis,)
      names = (*split, *(name for name in names if name is not None))
      if count % _ways(mesh, names) == 0:
        split = names
    by_row, layered = PartitionSpec(split), PartitionSpec(None, split)
    of_state = jax.tree.map(
      lambda x: layered if x.ndim > 1 else PartitionSpec(), state
    )

    def local(shared: Tree, rows: Tree, state: Tree) -> Tree:
      with nn.logical_axis_rules(()):  # nothing is split any more
        return run(shared, rows, state)

    return jax.shard_map(
      local,
      in_specs=(PartitionSpec(), by_row, of_state),
      out_specs=results(by_row, of_state),
      check_vma=False,
    )(shared, rows, state)

  return sharded


def by_heads(
  run: Callable, axes: tuple[str, ...], results: Any = "BH"
) -> Callable:
  """`run` by every device on its rows and heads, where the mesh divides them.

  Kernels are not partitioned automatically.  `axes`: the first axes of each
  argument of `run`, any trees: B and H are split, others not ("BH", "NB");
  `results`: a tree of those of what it returns.
  """
  mesh = _mesh()
  if mesh is None:
    return run

  def sharded(*arguments):
    batch, heads = jax.tree.leaves(arguments[axes.index("BH")])[0].shape[:2]
    rules = nn.logical_to_mesh_axes(("batch", "heads")) or (None, None)
    split = {
      letter: axis if size % _ways(mesh, axis) == 0 else None
      for letter, axis, size in zip("BH", rules, (batch, heads), strict=True)
    }
    spec = lambda letters: PartitionSpec(*map(split.get, letters))
    in_specs, out_specs = tuple(map(spec, axes)), jax.tree.map(spec, results)
    return jax.shard_map(
      run, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )(*arguments)

  return sharded
