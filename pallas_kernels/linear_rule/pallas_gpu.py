"""The learning rule as GPU kernels (Triton): the state stays in registers.

The rows of W learn independently: given x, the gates and its own error u_e, a
row does not depend on the others.  So the grid is (B H, P): every program takes
E / P rows through all chunks in a loop.  Gradients of what the rows share (x,
queries, gates) are computed per program and summed outside.  Backward takes the
vector-Jacobian product of each chunk, from the last to the first, recomputing
the chunk's first state from the last one saved before it.

Dimensions as in `pallas_common.py`; P parts of E.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.common import refs, scan
from pallas_kernels.linear_rule import one_chunk, pallas_common, tuning
from pallas_kernels.linear_rule.pallas_common import Chunks
from pallas_kernels.linear_rule.reference import (
  LinearRuleOutput,
  Rates,
  Read,
  State,
  Tokens,
)

# Three products on the tensor cores: float32 to about 1e-6.
_PRECISION = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def linear_rule_gpu(
  tokens: Tokens,
  rates: Rates,
  state: State,
  *,
  read: Read = "pre",
  chunk_length: int,
  interpret: bool = False,
) -> LinearRuleOutput:
  """`api.linear_rule` on a GPU, in float32.

  interpret: runs the kernels on any backend, slowly.

  Raises:
    NotImplementedError: K or E is not what the compiler can tile.
  """
  x, u = tokens.x, tokens.u
  if not can_tile(x.shape[-1], u.shape[-1]):
    raise NotImplementedError(
      f'"pallas_gpu" needs K and E that are powers of 2 from 16, not those of'
      f' {x.shape=}, {u.shape=}: use implementation="xla".'
    )
  blocks = tuning.gpu_blocks(
    x.shape[2],
    chunk_length,
    key_dim=x.shape[-1],
    value_dim=u.shape[-1],
    has_momentum=state.momentum is not None,
  )
  chunks, by_head = pallas_common.to_kernel_layout(
    tokens, rates, state, chunk_length=blocks.chunk_length
  )
  groups = jax.tree.map(
    lambda array: scan.fold_chunks(array, blocks.chunks, 1), chunks
  )
  precision = "highest" if interpret else _PRECISION
  step = pallas_common.Step(
    read,
    x.shape[2],
    blocks.num_tokens > x.shape[2],
    one_chunk.Arithmetic(precision, in_kernel=True),
  )
  outputs, by_head = _differentiable(
    groups, by_head, _Static(step, blocks, interpret)
  )
  return pallas_common.from_kernel_layout(outputs, by_head, u)


def can_tile(*sizes: int) -> bool:
  """Whether the compiler can tile arrays with sides of these sizes."""
  return all(size >= 16 and not size & (size - 1) for size in sizes)


class _Static(NamedTuple):
  """What the kernels are compiled for."""

  step: pallas_common.Step
  blocks: tuning.BlockSizes
  interpret: bool


# ----------------------------------------------------------------- kernels


def _forward_kernel(chunks, initial, outputs, final, saved, *, static):
  num_groups, num_chunks = chunks.tokens.x.shape[:2]

  def run_group(group, state):
    if saved is not None:
      refs.store(saved, group, state)

    def step(i, state):
      now = refs.load(chunks, (group, i))
      y, after = static.step(None, state, now, group * num_chunks + i)
      refs.store(outputs, (group, i), y)
      return after

    return jax.lax.fori_loop(0, num_chunks, step, state)

  state = jax.lax.fori_loop(0, num_groups, run_group, refs.load(initial))
  refs.store(final, ..., state)


def _backward_kernel(residuals, cotangents, d_chunks, d_initial, *, static):
  (chunks, saved), (d_outputs, d_final) = residuals, cotangents
  num_groups, num_chunks = chunks.tokens.x.shape[:2]

  def run_group(back, d_state):
    group = num_groups - 1 - back
    run = lambda state, now, i: static.step(
      None, state, now, group * num_chunks + i
    )

    def replay(i, state):
      now = refs.load(chunks.without_queries(), (group, i))
      return run(state, now, i)[1]

    def step(back, d_state):
      i = num_chunks - 1 - back
      state = jax.lax.fori_loop(0, i, replay, refs.load(saved, group))
      now = refs.load(chunks, (group, i))
      _, vjp = jax.vjp(functools.partial(run, i=i), state, now)
      d_state, d_now = vjp((refs.load(d_outputs, (group, i)), d_state))
      refs.store(d_chunks, (group, i), d_now)
      return d_state

    return jax.lax.fori_loop(0, num_chunks, step, d_state)

  d_state = jax.lax.fori_loop(0, num_groups, run_group, refs.load(d_final))
  refs.store(d_initial, ..., d_state)


# ------------------------------------------------------------------- calls


def _shared(array: jax.Array) -> pl.BlockSpec:
  """All of a head's x, queries or rates: [B H, ...]."""
  rest = array.shape[1:]
  return pl.BlockSpec((None, *rest), lambda b, p: (b, *(0,) * len(rest)))


def _columns(array: jax.Array, parts: int) -> pl.BlockSpec:
  """A part of a head's u or outputs, [B H, G, n, C, E]."""
  *rest, width = array.shape[1:]
  return pl.BlockSpec(
    (None, *rest, width // parts), lambda b, p: (b, *(0,) * len(rest), p)
  )


def _rows(array: jax.Array, parts: int) -> pl.BlockSpec:
  """A part of a head's states [B H, ..., E, K]."""
  *rest, height, width = array.shape[1:]
  return pl.BlockSpec(
    (None, *rest, height // parts, width),
    lambda b, p: (b, *(0,) * len(rest), p, 0),
  )


def _specs(parts: int, chunks: Chunks, *states: Any) -> tuple[Any, ...]:
  """Blocks of chunks, then of states."""
  specs = jax.tree.map(_shared, chunks)
  rows = functools.partial(_rows, parts=parts)
  return (
    specs.with_u(_columns(chunks.tokens.u, parts)),
    *(jax.tree.map(rows, state) for state in states),
  )


def _options(static: _Static) -> dict[str, Any]:
  return dict(
    compiler_params=pltriton.CompilerParams(
      num_warps=static.blocks.num_warps, num_stages=1
    ),
    interpret=static.interpret,
  )


def _forward(chunks: Chunks, state: State, static: _Static, *, save: bool):
  """(outputs [B H, G, n, C, E], final state, states at groups' starts)."""
  parts, tokens = static.blocks.parts, chunks.tokens
  outputs = None if tokens.queries is None else refs.like(tokens.u)
  saved = refs.like(state, tokens.x.shape[1]) if save else None
  chunk_specs, state_specs, saved_specs = _specs(parts, chunks, state, saved)
  return pl.pallas_call(
    functools.partial(_forward_kernel, static=static),
    grid=(tokens.x.shape[0], parts),
    in_specs=(chunk_specs, state_specs),
    out_specs=(outputs and chunk_specs.tokens.u, state_specs, saved_specs),
    out_shape=(outputs, refs.like(state), saved),
    name="linear_rule_forward",
    **_options(static),
  )(chunks, state)


def _backward(residuals: Any, cotangents: Any, static: _Static):
  """Cotangents of chunks and state."""
  (chunks, saved), (d_outputs, d_final) = residuals, cotangents
  parts, u = static.blocks.parts, chunks.tokens.u
  chunk_specs, saved_specs, state_specs = _specs(parts, chunks, saved, d_final)
  u_specs = chunk_specs.tokens.u

  def shape_per_part(array):
    """Shape of a gradient that all parts add to: [B H, P, ...] in float32."""
    shape = array.shape[0], parts, *array.shape[1:]
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  def spec_per_part(array):
    rest = array.shape[1:]
    return pl.BlockSpec(
      (None, None, *rest), lambda b, p: (b, p, *(0,) * len(rest))
    )

  shared = chunks.with_u(None)
  shapes = jax.tree.map(shape_per_part, shared)
  specs = jax.tree.map(spec_per_part, shared)
  d_chunks, d_state = pl.pallas_call(
    functools.partial(_backward_kernel, static=static),
    grid=(u.shape[0], parts),
    in_specs=(
      (chunk_specs, saved_specs),
      (None if d_outputs is None else u_specs, state_specs),
    ),
    out_specs=(specs.with_u(u_specs), state_specs),
    out_shape=(shapes.with_u(refs.like(u)), refs.like(d_final)),
    name="linear_rule_backward",
    **_options(static),
  )(residuals, cotangents)
  summed = jax.tree.map(
    lambda d, x: jnp.sum(d, axis=1).astype(x.dtype),
    d_chunks.with_u(None),
    shared,
  )
  return summed.with_u(d_chunks.tokens.u), d_state


def _values(chunks, state, static):
  return _forward(chunks, state, static, save=False)[:2]


def _values_and_saved(chunks, state, static):
  outputs, final, saved = _forward(chunks, state, static, save=True)
  return (outputs, final), (chunks, saved)


def _gradients(static, residuals, cotangents):
  return _backward(residuals, cotangents, static)


_differentiable: Any = jax.custom_vjp(_values, nondiff_argnums=(2,))
_differentiable.defvjp(_values_and_saved, _gradients)
