"""The generalized delta rule in XLA: a scan over chunks with `one_chunk.py`.

Dimensions: B batch, H heads, T tokens, K key dim, E value dim.
"""

import functools

import jax

from pallas_kernels.common import scan as scan_lib
from pallas_kernels.generalized_delta_rule import one_chunk
from pallas_kernels.generalized_delta_rule.reference import (
  DeltaRuleOutput,
  Tokens,
)


def generalized_delta_rule_xla(
  tokens: Tokens,
  weight: jax.Array,
  *,
  chunk_length: int,
  fastest_decay: float,
  checkpoint: scan_lib.CheckpointPolicy = "sqrt",
) -> DeltaRuleOutput:
  """`api.generalized_delta_rule` for decays within the bounds."""
  num_tokens = tokens.keys.shape[2]
  chunk_length = min(chunk_length, num_tokens)
  # The last chunk is padded with tokens that neither decay, erase nor write.
  chunks = jax.tree.map(
    lambda x: scan_lib.split_chunks(x, chunk_length), tokens
  )
  weight, outputs = scan_lib.checkpointed_scan(
    functools.partial(one_chunk.chunk_rule, fastest_decay=fastest_decay),
    weight,
    chunks,
    policy=checkpoint,
  )
  return DeltaRuleOutput(scan_lib.merge_chunks(outputs, num_tokens), weight)
