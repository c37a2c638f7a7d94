"""The learning rule as TPU kernels: the state stays in VMEM across chunks.

Both kernels run on a grid (B H, G) over groups of n chunks; the second axis is
sequential and the state lives in scratch across it.  Forward goes over a
group's chunks in turn and, for the backward pass, saves the state at each
group's start.  Backward visits the groups from last to first: it recomputes the
group's states in VMEM, then takes each chunk's vector-Jacobian product, which
is `jax.vjp` of the same pure function of `chunk.py` that forward runs.

Dimensions as in `pallas_common.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_rule import pallas_common as common
from pallas_kernels.linear_rule import tuning
from pallas_kernels.linear_rule.pallas_common import State, Static, Tokens
from pallas_kernels.linear_rule.reference import LinearRuleOutput


def linear_rule_tpu(
  x: jax.Array,
  u: jax.Array,
  *,
  chunk_length: int,
  interpret: Any = False,
  **options: Any,
) -> LinearRuleOutput:
  """`api.linear_rule` on a TPU, in float32; all its arguments.

  interpret: as of `pl.pallas_call`; runs the kernels elsewhere, slowly.
  """
  blocks = tuning.tpu_blocks(
    x.shape[2],
    chunk_length,
    key_dim=x.shape[-1],
    value_dim=u.shape[-1],
    has_momentum=options["momentum"] is not None,
  )
  return common.run(
    common.Kernels(_forward, _backward),
    blocks,
    x,
    u,
    interpret=interpret,
    **options,
  )


def _forward_kernel(tokens, initial, outputs, final, saved, state, *, static):
  group, chunks = pl.program_id(1), tokens.x.shape[0]

  @pl.when(group == 0)
  def _():
    common.store(state, ..., common.load(initial))

  if saved is not None:
    common.store(saved, ..., common.load(state))

  def step(i, _):
    now = common.load(state), common.load(tokens, i)
    y, after = common.run_chunk(*now, group * chunks + i, static)
    common.store(outputs, i, y)
    common.store(state, ..., after)

  jax.lax.fori_loop(0, chunks, step, None)

  @pl.when(group == pl.num_programs(1) - 1)
  def _():
    common.store(final, ..., common.load(state))


def _backward_kernel(
  tokens,
  saved,
  d_outputs,
  d_final,
  d_tokens,
  d_initial,
  states,
  d_state,
  *,
  static,
):
  last = pl.num_programs(1) - 1
  group, chunks = last - pl.program_id(1), tokens.x.shape[0]

  @pl.when(group == last)
  def _():
    common.store(d_state, ..., common.load(d_final))

  common.store(states, 0, common.load(saved))

  def recompute(i, _):
    now = common.load(states, i), common.load(tokens, i)
    place = group * chunks + i
    _, after = common.run_chunk(*now, place, static, with_read=False)
    common.store(states, i + 1, after)

  jax.lax.fori_loop(0, chunks - 1, recompute, None)

  def step(i, _):
    i = chunks - 1 - i
    d_before, d_chunk = common.chunk_vjp(
      common.load(states, i),
      common.load(tokens, i),
      common.load(d_outputs, i),
      common.load(d_state),
      group * chunks + i,
      static,
    )
    common.store(d_tokens, i, d_chunk)
    common.store(d_state, ..., d_before)

  jax.lax.fori_loop(0, chunks, step, None)

  @pl.when(group == 0)
  def _():
    common.store(d_initial, ..., common.load(d_state))


# ------------------------------------------------------------------- calls


def _by_head(tree: Any) -> Any:
  """Blocks of arrays [B H, ...]: all of a head, at every step."""

  def block(array):
    rest = array.shape[1:]
    return pl.BlockSpec((None, *rest), lambda b, g: (b, *(0,) * len(rest)))

  return jax.tree.map(block, tree)


def _by_group(tree: Any, *, last_first: bool = False) -> Any:
  """Blocks of arrays [B H, G, ...]: a head's group per step."""

  def block(array):
    num_groups, *rest = array.shape[1:]
    place = lambda g: num_groups - 1 - g if last_first else g
    return pl.BlockSpec(
      (None, None, *rest), lambda b, g: (b, place(g), *(0,) * len(rest))
    )

  return jax.tree.map(block, tree)


def _scratch(state: State, *axes: int) -> State:
  """VMEM for one head's state."""
  return jax.tree.map(
    lambda x: pltpu.VMEM((*axes, *x.shape[1:]), jnp.float32), state
  )


_PARAMS = pltpu.CompilerParams(
  dimension_semantics=("parallel", "arbitrary"),
  vmem_limit_bytes=tuning.TPU_VMEM,
)


def _forward(tokens: Tokens, state: State, static: Static, *, save: bool):
  """(outputs [B H, G, n, C, E], final state, the states at groups' starts)."""
  grid = tokens.x.shape[:2]
  outputs = None if tokens.queries is None else common.like(tokens.u)
  saved = common.like(state, axes=grid[1:]) if save else None
  return pl.pallas_call(
    functools.partial(_forward_kernel, static=static),
    grid=grid,
    in_specs=(_by_group(tokens), _by_head(state)),
    out_specs=(_by_group(outputs), _by_head(state), _by_group(saved)),
    out_shape=(outputs, common.like(state), saved),
    scratch_shapes=(_scratch(state),),
    compiler_params=_PARAMS,
    interpret=static.interpret,
    name="linear_rule_forward",
  )(tokens, state)


def _backward(tokens: Tokens, saved: State, d_outputs, d_final: State, static):
  """Cotangents of `_forward`'s tokens and state."""
  grid = tokens.x.shape[:2]
  last_first = functools.partial(_by_group, last_first=True)
  return pl.pallas_call(
    functools.partial(_backward_kernel, static=static),
    grid=grid,
    in_specs=(
      *map(last_first, (tokens, saved, d_outputs)),
      _by_head(d_final),
    ),
    out_specs=(last_first(tokens), _by_head(d_final)),
    out_shape=(common.like(tokens), common.like(d_final)),
    scratch_shapes=(_scratch(d_final, tokens.x.shape[2]), _scratch(d_final)),
    compiler_params=_PARAMS,
    interpret=static.interpret,
    name="linear_rule_backward",
  )(tokens, saved, d_outputs, d_final)
