"""Bytes that a kernel moves between HBM and the chip, from its block specs.

A block is fetched, or written back, whenever its place changes from one step of
the grid to the next; in HBM it lies in tiles of 8 x 128 of 32 bits.  The floor
is every input read and every output written once.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core


class Traffic(NamedTuple):
  """Bytes of one kernel call: moved, and of all its arrays once."""

  name: str
  moved: int
  floor: int


def of_kernels(function: Callable, *args: Any) -> list[Traffic]:
  """Of every Pallas call in `function(*args)`; args may be
  ShapeDtypeStructs.  A call in a loop counts once."""
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return [_of_call(equation) for equation in _calls(jaxpr)]


def _calls(jaxpr: Any) -> Iterator[Any]:
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield equation
      continue
    for value in equation.params.values():
      for item in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(item, "jaxpr", item)
        if hasattr(inner, "eqns"):
          yield from _calls(inner)


def _of_call(equation: Any) -> Traffic:
  grid_mapping = equation.params["grid_mapping"]
  steps = list(itertools.product(*map(range, grid_mapping.grid)))
  moved = floor = 0
  for mapping in grid_mapping.block_mappings:
    array = mapping.array_aval
    floor += math.prod(array.shape) * array.dtype.itemsize
    moved += _moves(mapping, steps) * _block_bytes(mapping, array.dtype)
  return Traffic(equation.params["name"], moved, floor)


def _moves(mapping: Any, steps: list[tuple[int, ...]]) -> int:
  """How often the block's place changes, the first time included."""
  place = core.jaxpr_as_fun(mapping.index_map_jaxpr)
  places = [
    tuple(int(i) for i in place(*(np.int32(i) for i in step))) for step in steps
  ]
  return 1 + sum(a != b for a, b in itertools.pairwise(places))


def _block_bytes(mapping: Any, dtype: Any) -> int:
  sizes = [getattr(size, "block_size", 1) for size in mapping.block_shape]
  *outer, rows, columns = (1, 1, *sizes)
  sublanes = 8 * 4 // dtype.itemsize
  tiles = -(-rows // sublanes) * -(-columns // 128)
  return math.prod(outer) * tiles * sublanes * 128 * dtype.itemsize
