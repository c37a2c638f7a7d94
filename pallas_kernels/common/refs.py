"""Trees of refs inside a kernel, and of shapes outside."""

from typing import Any

import jax


def load(refs: Any, index: Any = ...) -> Any:
  """Reads every ref of the tree at `index`."""
  return jax.tree.map(lambda ref: ref[index], refs)


def store(refs: Any, index: Any, values: Any) -> None:
  """Writes values to every ref of the tree at `index`, in its dtype."""

  def write(ref, value):
    ref[index] = value.astype(ref.dtype)

  jax.tree.map(write, refs, values)


def like(tree: Any, *axes: int) -> Any:
  """Shapes and dtypes of arrays [S, ...], with `axes` after the first one."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((x.shape[0], *axes, *x.shape[1:]), x.dtype),
    tree,
  )
