"""A scan over chunks as one TPU kernel: the state stays in VMEM.

`fused_scan(step, ...)` is `jax.lax.scan` over the chunks of S independent
sequences (a sequence here is one head of one batch element), for a pure `step`
on one chunk of one of them.  Its kernels run on a grid (S, G) over groups of n
chunks, of which the second axis is sequential, with the state in scratch:

* forward goes through a group's chunks in order and, if it is differentiated,
  saves the state at each group's start;
* backward visits the groups from last to first, recomputes a group's states in
  VMEM from the saved one, and takes `jax.vjp` of `step` chunk by chunk.

So the outer gradient needs no code of its own.  `step` may only use what the
TPU compiler supports: matrix products, masks, sums and elementwise functions.

HBM traffic: forward reads xs and the state, writes ys and the state once (and
1 / n states per chunk); backward reads xs, the saved states and the cotangents
and writes the gradients.

Legend: S sequences, H sets of shared arrays, G groups, n chunks of a group.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import refs, scan

# v5e, v5p and v6e have 128 MiB of VMEM per core, of which a kernel gets 16
# unless it asks for more.  States and blocks take at most a quarter of what is
# requested; the rest is for the intermediates of a chunk's VJP.
VMEM_BYTES = 64 * 2**20
_BLOCK_BYTES = VMEM_BYTES // 4
_MAX_CHUNKS = 16


class Options(NamedTuple):
  """How `fused_scan` runs; `interpret` as in `pl.pallas_call`."""

  name: str
  interpret: Any = False


def fused_scan(
  step: Callable,
  state: Any,
  xs: Any,
  shared: Any = None,
  *,
  name: str = "fused_scan",
  interpret: Any = False,
) -> tuple[Any, Any]:
  """(ys, the state after): y, state = step(shared, state, x, index) per chunk.

  Differentiable in state, xs and shared; computed in the state's dtypes.

  Args:
    step: works on one chunk of one sequence; `index` is the chunk's number,
      int32.  It must close over no arrays and be hashable: equal steps compile
      once.
    state: any tree of float32 [S, ...].
    xs: any tree of float [S, N, ...], the inputs of N chunks.
    shared: any tree of [H, ...]; sequence s uses the (s mod H)-th.
    name: name of the kernels in profiles and HLO.
    interpret: runs the kernels on any backend, slowly.

  Returns:
    ys, a tree of [S, N, ...]; the state, [S, ...].
  """
  num_chunks = jax.tree.leaves(xs)[0].shape[1]
  chunks = chunks_per_step(num_chunks, state, xs)
  group = lambda x: scan.fold_chunks(x, chunks, 1)
  if num_chunks % chunks:
    step = _Until(step, num_chunks)
  ys, state = _differentiable(
    state, jax.tree.map(group, xs), shared, step, Options(name, interpret)
  )
  ungroup = lambda y: y.reshape(y.shape[0], -1, *y.shape[3:])[:, :num_chunks]
  return jax.tree.map(ungroup, ys), state


@dataclasses.dataclass(frozen=True)
class _Until:
  """`step`, but from chunk `num_chunks` on the state does not change."""

  step: Callable
  num_chunks: int

  def __call__(self, shared, state, x, index):
    y, after = self.step(shared, state, x, index)
    choose = lambda new, old: jnp.where(index < self.num_chunks, new, old)
    return y, jax.tree.map(choose, after, state)


def chunks_per_step(num_chunks: int, state: Any, xs: Any) -> int:
  """As many chunks as fit in VMEM with their states, evenly over all steps."""
  states = sum(_tiled_bytes(x.shape[1:]) for x in jax.tree.leaves(state))
  # xs, their gradients and outputs of the same size, each in two buffers.
  blocks = sum(_tiled_bytes(x.shape[2:]) for x in jax.tree.leaves(xs))
  fit = max(1, min(_MAX_CHUNKS, _BLOCK_BYTES // (states + 6 * blocks)))
  return -(-num_chunks // -(-num_chunks // fit))


def _tiled_bytes(shape: tuple[int, ...]) -> int:
  """Bytes of a float32 array in VMEM, in tiles of 8 x 128."""
  *outer, rows, columns = (1, 1, *shape)
  tiles = -(-rows // 8) * -(-columns // 128)
  return 4 * 8 * 128 * tiles * math.prod(outer)


# ----------------------------------------------------------------- kernels


def _forward_kernel(inputs, outputs, state, *, step, chunks):
  (initial, xs, shared), (ys, final, saved) = inputs, outputs
  group = pl.program_id(1)

  @pl.when(group == 0)
  def _():
    refs.store(state, ..., refs.load(initial))

  if saved is not None:
    refs.store(saved, ..., refs.load(state))

  def run(i, _):
    y, after = step(
      refs.load(shared), refs.load(state), refs.load(xs, i), group * chunks + i
    )
    refs.store(ys, i, y)
    refs.store(state, ..., after)

  jax.lax.fori_loop(0, chunks, run, None)

  @pl.when(group == pl.num_programs(1) - 1)
  def _():
    refs.store(final, ..., refs.load(state))


def _backward_kernel(
  residuals, cotangents, gradients, scratch, *, step, chunks
):
  (xs, shared, saved), (d_ys, d_final) = residuals, cotangents
  (d_initial, d_xs, d_shared), (states, d_state) = gradients, scratch
  last = pl.num_programs(1) - 1
  group = last - pl.program_id(1)

  @pl.when(group == last)
  def _():
    refs.store(d_state, ..., refs.load(d_final))
    refs.store(d_shared, ..., jax.tree.map(jnp.zeros_like, refs.load(d_shared)))

  refs.store(states, 0, refs.load(saved))

  def recompute(i, _):
    now = refs.load(states, i), refs.load(xs, i)
    _, after = step(refs.load(shared), *now, group * chunks + i)
    refs.store(states, i + 1, after)

  jax.lax.fori_loop(0, chunks - 1, recompute, None)

  def run(back, _):
    i = chunks - 1 - back
    _, vjp = jax.vjp(
      lambda *args: step(*args, group * chunks + i),
      refs.load(shared),
      refs.load(states, i),
      refs.load(xs, i),
    )
    d_of_shared, d_before, d_x = vjp((refs.load(d_ys, i), refs.load(d_state)))
    refs.store(d_xs, i, d_x)
    refs.store(d_state, ..., d_before)
    total = jax.tree.map(jnp.add, refs.load(d_shared), d_of_shared)
    refs.store(d_shared, ..., total)

  jax.lax.fori_loop(0, chunks, run, None)

  @pl.when(group == 0)
  def _():
    refs.store(d_initial, ..., refs.load(d_state))


# ------------------------------------------------------------------- calls


def _by_sequence(tree: Any, count: int | None = None) -> Any:
  """Blocks of arrays [S, ...]: all of sequence s at each of its steps; with
  `count`, of arrays [count, ...]: entry s mod `count`."""

  def block(x):
    rest = x.shape[1:]
    place = lambda s: s if count is None else jax.lax.rem(s, np.int32(count))
    return pl.BlockSpec(
      (None, *rest), lambda s, g: (place(s), *(0,) * len(rest))
    )

  return jax.tree.map(block, tree)


def _by_group(tree: Any, *, last_first: bool = False) -> Any:
  """Blocks of arrays [S, G, ...]: a sequence's group per step."""

  def block(x):
    groups, *rest = x.shape[1:]
    place = lambda g: groups - 1 - g if last_first else g
    return pl.BlockSpec(
      (None, None, *rest), lambda s, g: (s, place(g), *(0,) * len(rest))
    )

  return jax.tree.map(block, tree)


def _scratch(state: Any, *axes: int) -> Any:
  """VMEM for one sequence's state."""
  return jax.tree.map(
    lambda x: pltpu.VMEM((*axes, *x.shape[1:]), x.dtype), state
  )


def _call(kernel: Callable, xs: Any, options: Options, suffix: str, **kwargs):
  grid = jax.tree.leaves(xs)[0].shape[:2]
  return pl.pallas_call(
    kernel,
    grid=grid,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=VMEM_BYTES,
    ),
    interpret=options.interpret,
    name=f"{options.name}_{suffix}",
    **kwargs,
  )


def _shape_of_ys(step: Callable, state: Any, xs: Any, shared: Any) -> Any:
  """Shapes of the outputs of all sequences and groups."""
  drop = lambda tree, count: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[count:], x.dtype), tree
  )
  index = jax.ShapeDtypeStruct((), jnp.int32)
  one = drop(shared, 1), drop(state, 1), drop(xs, 3), index
  lead = jax.tree.leaves(xs)[0].shape[:3]
  return jax.tree.map(
    lambda y: jax.ShapeDtypeStruct((*lead, *y.shape), y.dtype),
    jax.eval_shape(step, *one)[0],
  )


def _num_shared(shared: Any) -> int:
  leaves = jax.tree.leaves(shared)
  return leaves[0].shape[0] if leaves else 1


def _forward(state, xs, shared, step, options, *, save):
  _, groups, chunks = jax.tree.leaves(xs)[0].shape[:3]
  ys = _shape_of_ys(step, state, xs, shared)
  saved = refs.like(state, groups) if save else None
  in_specs = (
    _by_sequence(state),
    _by_group(xs),
    _by_sequence(shared, _num_shared(shared)),
  )
  (outputs,) = _call(
    functools.partial(_forward_kernel, step=step, chunks=chunks),
    xs,
    options,
    "forward",
    in_specs=(in_specs,),
    out_specs=((_by_group(ys), _by_sequence(state), _by_group(saved)),),
    out_shape=((ys, refs.like(state), saved),),
    scratch_shapes=(_scratch(state),),
  )((state, xs, shared))
  return outputs


def _values(state, xs, shared, step, options):
  return _forward(state, xs, shared, step, options, save=False)[:2]


def _values_and_saved(state, xs, shared, step, options):
  ys, final, saved = _forward(state, xs, shared, step, options, save=True)
  return (ys, final), (xs, shared, saved)


def _gradients(step, options, residuals, cotangents):
  xs, shared, saved = residuals
  d_ys, d_final = cotangents
  count, _, chunks = jax.tree.leaves(xs)[0].shape[:3]
  last_first = functools.partial(_by_group, last_first=True)
  d_shared = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), shared
  )
  specs = _by_sequence(d_final), last_first(xs), _by_sequence(d_shared)
  shared_specs = _by_sequence(shared, _num_shared(shared))
  ((d_initial, d_xs, d_shared),) = _call(
    functools.partial(_backward_kernel, step=step, chunks=chunks),
    xs,
    options,
    "backward",
    in_specs=(
      (last_first(xs), shared_specs, last_first(saved)),
      (last_first(d_ys), _by_sequence(d_final)),
    ),
    out_specs=(specs,),
    out_shape=((refs.like(d_final), refs.like(xs), d_shared),),
    scratch_shapes=((_scratch(d_final, chunks), _scratch(d_final)),),
  )(residuals, cotangents)
  d_shared = jax.tree.map(
    lambda d, x: jnp.sum(d.reshape(-1, *x.shape), axis=0), d_shared, shared
  )
  return d_initial, d_xs, d_shared


_differentiable: Any = jax.custom_vjp(_values, nondiff_argnums=(3, 4))
_differentiable.defvjp(_values_and_saved, _gradients)
