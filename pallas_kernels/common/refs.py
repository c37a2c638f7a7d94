"""Trees of refs inside a kernel, and of shapes outside."""

from typing import Any

import jax


def load(refs: Any, index: Any = ...) -> Any:
  """What stands at an index of every ref."""
  return jax.tree.map(lambda ref: ref[index], refs)


def store(refs: Any, index: Any, values: Any) -> None:
  """Writes values to an index of every ref, in its dtype."""

  def write(ref, value):
    ref[index] = value.astype(ref.dtype)

  jax.tree.map(write, refs, values)


def like(tree: Any, *axes: int) -> Any:
  """Shapes and dtypes of arrays [S, ...], with more axes after the first."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((x.shape[0], *axes, *x.shape[1:]), x.dtype),
    tree,
  )
