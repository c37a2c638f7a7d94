"""The selective scan in XLA.

All states of a chunk are found in log2(C) steps by an associative scan, with no
loop over tokens; chunks follow each other in a checkpointed scan, so that no
array [B, T, E, K] exists.  Exact for any chunk length.

Dimensions: B batch, T tokens, C chunk length, E channels, K numbers per
channel.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.common import scan
from pallas_kernels.selective_scan.reference import ScanOutput, Tokens


def selective_scan_xla(
  tokens: Tokens,
  decay_rate: jax.Array,
  state: jax.Array,
  *,
  chunk_length: int,
  checkpoint: scan.CheckpointPolicy = "chunk",
) -> ScanOutput:
  """`reference.selective_scan_reference` by chunks of `chunk_length` tokens."""
  length = tokens.values.shape[1]

  def run(state: jax.Array, chunk: Tokens) -> tuple[jax.Array, jax.Array]:
    decay = jnp.exp(-chunk.step_size[..., None] * decay_rate[None, None])
    decay = jnp.where(chunk.reset[..., None, None], 0.0, decay)
    write = (chunk.step_size * chunk.values)[..., None] * chunk.keys[:, :, None]
    decay, states = jax.lax.associative_scan(_follow, (decay, write), axis=1)
    states = states + decay * state[:, None]
    return states[:, -1], jnp.einsum("BCEK,BCK->BCE", states, chunk.queries)

  # The last chunk is padded with steps of 0, which leave the state unchanged.
  chunks = jax.tree.map(
    lambda x: scan.split_chunks(x, min(chunk_length, length), axis=1), tokens
  )
  state, outputs = scan.checkpointed_scan(run, state, chunks, policy=checkpoint)
  return ScanOutput(scan.merge_chunks(outputs, length, axis=1), state)


def _follow(
  first: tuple[jax.Array, jax.Array], then: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Composes the maps h -> a h + b of a stretch of tokens and of the next."""
  return first[0] * then[0], then[0] * first[1] + then[1]
