"""The learning rule by chunks in XLA: a scan over the functions of `chunk.py`.

Dimensions: B batch, H heads, T tokens, N chunks, C chunk length, K input width,
E output width.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common import scan as scan_lib
from pallas_kernels.linear_rule import chunk as chunk_lib
from pallas_kernels.linear_rule import reference

LinearRuleOutput = reference.LinearRuleOutput
Read = reference.Read


def linear_rule_chunked(
  x: jax.Array,
  u: jax.Array,
  *,
  weight: jax.Array,
  momentum: jax.Array | None,
  retention: jax.Array,
  momentum_decay: jax.Array | None,
  learn_rate: jax.Array,
  erase: jax.Array | None,
  queries: jax.Array | None = None,
  read: Read = "pre",
  reset: jax.Array | None = None,
  chunk_length: int,
  checkpoint: scan_lib.CheckpointPolicy = "sqrt",
) -> LinearRuleOutput:
  """`reference.linear_rule_reference` by chunks of `chunk_length` tokens.

  The decays are computed for all chunks at once; a scan then carries the state
  over the chunks. `checkpoint` says what the backward pass recomputes
  (`scan.checkpointed_scan`).
  """
  num_tokens = x.shape[2]
  chunk_length = min(chunk_length, num_tokens)
  live = None
  if num_tokens % chunk_length:
    live = jnp.ones(retention.shape, bool)
  split = functools.partial(
    jax.tree.map, lambda leaf: scan_lib.split_chunks(leaf, chunk_length)
  )
  decays = chunk_lib.chunk_decays(
    split(retention),
    split(momentum_decay),
    live=split(live),
    reset=split(reset),
    read=read,
  )

  def body(state, chunk):
    x, u, queries, decays, learn_rate, erase = chunk
    weight, momentum = state
    out = chunk_lib.chunk_rule(
      x,
      u,
      weight=weight,
      momentum=momentum,
      decays=decays,
      learn_rate=learn_rate,
      erase=erase,
      queries=queries,
      read=read,
    )
    return (out.weight, out.momentum), out.outputs

  chunks = (*split((x, u, queries)), decays, *split((learn_rate, erase)))
  dtype = reference.state_dtype(weight, chunks)
  state = jax.tree.map(lambda leaf: leaf.astype(dtype), (weight, momentum))
  (weight, momentum), outputs = scan_lib.checkpointed_scan(
    body, state, chunks, policy=checkpoint
  )
  if outputs is not None:
    outputs = scan_lib.merge_chunks(outputs, num_tokens).astype(u.dtype)
  return LinearRuleOutput(outputs, weight, momentum)
