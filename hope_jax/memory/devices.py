"""Work that every device does on its own rows or heads of a batch.

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
  """The mesh to split work over; None with a single device, and where the code
  already runs per device (inside a `shard_map`)."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
    return None
  return mesh


def _ways(mesh: Any, axis: Any) -> int:
  """Number of devices over which one or several mesh axes split an array."""
  names = axis if isinstance(axis, tuple) else (axis,)
  return math.prod(mesh.shape[name] for name in names if name is not None)


def by_rows(run: Callable, results: Callable[[Tree, Tree], Tree]) -> Callable:
  """Runs `run(shared, rows, state)` on every device for its own rows, so that
  loops inside it need no communication.

  Rows are split over the mesh axes of the batch and also over those of heads,
  if the number of rows is divisible.  `shared` is gathered on every device
  beforehand, and its gradient is summed over the devices afterwards; `rows` are
  [B, ...]; leaves of `state` are [layers, B, ...], or have no B and at most one
  axis.

  Args:
    results: (sharding of rows, sharding of `state`) -> sharding of the results.
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
      with nn.logical_axis_rules(()):  # no axis is split any further
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
  """Runs `run` on every device for its own rows and heads.

  Kernels are not partitioned automatically.  `axes` names the first axes of
  each argument (any tree), as in "BH" or "NB": B and H are split where the mesh
  divides them, others never.  `results` is a tree of such names for what `run`
  returns.
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
