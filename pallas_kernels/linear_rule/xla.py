"""The learning rule in XLA: a scan over chunks with `one_chunk.py`.

Dimensions: B batch, H heads, T tokens, N chunks, C chunk length, K input width,
E output width.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common import scan as scan_lib
from pallas_kernels.linear_rule import one_chunk, reference
from pallas_kernels.linear_rule.reference import (
  LinearRuleOutput,
  Rates,
  Read,
  State,
  Tokens,
)


def linear_rule_xla(
  tokens: Tokens,
  rates: Rates,
  state: State,
  *,
  read: Read = "pre",
  chunk_length: int,
  checkpoint: scan_lib.CheckpointPolicy = "sqrt",
) -> LinearRuleOutput:
  """`reference.linear_rule_reference` by chunks of `chunk_length` tokens.

  The decays are computed for all chunks at once; a scan then carries the state
  over the chunks. `checkpoint` says what the backward pass recomputes
  (`scan.checkpointed_scan`).
  """
  num_tokens = tokens.x.shape[2]
  chunk_length = min(chunk_length, num_tokens)
  live = None
  if num_tokens % chunk_length:
    live = jnp.ones(rates.retention.shape, bool)
  split = functools.partial(
    jax.tree.map, lambda leaf: scan_lib.split_chunks(leaf, chunk_length)
  )
  by_chunk = split(rates)
  decays = one_chunk.chunk_decays(
    by_chunk.retention,
    by_chunk.momentum_decay,
    live=split(live),
    reset=by_chunk.reset,
    read=read,
  )

  def body(state, chunk):
    tokens, decays, step_size, erase = chunk
    out = one_chunk.chunk_rule(
      tokens,
      state,
      decays=decays,
      step_size=step_size,
      erase=erase,
      read=read,
    )
    return State(out.weight, out.momentum), out.outputs

  chunks = split(tokens), decays, by_chunk.step_size, by_chunk.erase
  dtype = reference.state_dtype(state, chunks)
  state = jax.tree.map(lambda leaf: leaf.astype(dtype), state)
  state, outputs = scan_lib.checkpointed_scan(
    body, state, chunks, policy=checkpoint
  )
  if outputs is not None:
    outputs = scan_lib.merge_chunks(outputs, num_tokens)
    outputs = outputs.astype(tokens.u.dtype)
  return LinearRuleOutput(outputs, *state)
