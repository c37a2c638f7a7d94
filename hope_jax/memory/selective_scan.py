"""Mamba's recurrence: a state per channel, every number with its own decay.

  h_t = exp(-s_t A) h_{t-1} + s_t x_t k_t^T;   o_t = h_t q_t

elementwise in exp(-s A) [E, K] (2312.00752, section 3; there s, k, q are dt,
B, C).  All states of a chunk are found in log2(C) steps by an associative scan,
with no loop over tokens; chunks follow each other in a checkpointed scan, so
that no array [B, T, E, K] exists.  Exact for any chunk length.

Legend: B batch, T tokens, C chunk length, E channels, K numbers per channel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.scan import (
  CheckpointPolicy,
  checkpointed_scan,
  merge_chunks,
  split_chunks,
)


class ScanOutput(NamedTuple):
  """o [B, T, E]; the state after the last token [B, E, K]."""

  outputs: jax.Array
  state: jax.Array


class _Tokens(NamedTuple):
  """What the scan reads: [B, T, E], [B, T, K], or [B, T]."""

  values: jax.Array
  step: jax.Array
  keys: jax.Array
  queries: jax.Array
  reset: jax.Array


def selective_scan(
  values: jax.Array,
  step: jax.Array,
  *,
  keys: jax.Array,
  queries: jax.Array,
  rate: jax.Array,
  state: jax.Array,
  reset: jax.Array | None = None,
  chunk_length: int = 64,
  checkpoint: CheckpointPolicy = "chunk",
) -> ScanOutput:
  """The recurrence from `state` [B, E, K] on, in the state's dtype.

  Args:
    values, step: x and s, [B, T, E].
    keys, queries: [B, T, K], the same for all channels.
    rate: A > 0, [E, K].
    reset: [B, T]; where true the state is zero before the token.
  """
  length = values.shape[1]
  if reset is None:
    reset = jnp.zeros(values.shape[:2], bool)
  cast = lambda x: x.astype(state.dtype)
  rate = cast(rate)
  tokens = _Tokens(cast(values), cast(step), cast(keys), cast(queries), reset)

  def run(state: jax.Array, chunk: _Tokens) -> tuple[jax.Array, jax.Array]:
    decay = jnp.exp(-chunk.step[..., None] * rate[None, None])
    decay = jnp.where(chunk.reset[..., None, None], 0.0, decay)
    write = (chunk.step * chunk.values)[..., None] * chunk.keys[:, :, None]
    decay, states = jax.lax.associative_scan(_follow, (decay, write), axis=1)
    states = states + decay * state[:, None]
    return states[:, -1], jnp.einsum("BCEK,BCK->BCE", states, chunk.queries)

  # Steps of 0 fill the last chunk up: they keep the state as it is.
  chunks = jax.tree.map(
    lambda x: split_chunks(x, min(chunk_length, length), axis=1), tokens
  )
  state, outputs = checkpointed_scan(run, state, chunks, policy=checkpoint)
  return ScanOutput(merge_chunks(outputs, length, axis=1), state)


def _follow(
  first: tuple[jax.Array, jax.Array], then: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """h -> a h + b of one stretch of tokens, after that of the one before."""
  return first[0] * then[0], then[0] * first[1] + then[1]
