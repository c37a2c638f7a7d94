"""The learning rule as TPU kernels: `fused_scan` over the chunks of a head."""

from typing import Any

import jax

from pallas_kernels.common import fused_scan
from pallas_kernels.linear_rule import chunk, pallas_common
from pallas_kernels.linear_rule.reference import LinearRuleOutput, Read


def linear_rule_tpu(
  x: jax.Array,
  u: jax.Array,
  *,
  read: Read = "pre",
  chunk_length: int,
  interpret: Any = False,
  **arguments: Any,
) -> LinearRuleOutput:
  """`api.linear_rule` on a TPU, in float32; all its arguments.

  interpret: as of `pl.pallas_call`; runs the kernels elsewhere, slowly.
  """
  num_tokens = x.shape[2]
  chunk_length = min(chunk_length, num_tokens)
  state, tokens = pallas_common.enter(
    x, u, chunk_length=chunk_length, **arguments
  )
  step = pallas_common.Step(
    read,
    num_tokens,
    num_tokens % chunk_length > 0,
    chunk.Arithmetic(in_kernel=True),
  )
  outputs, state = fused_scan.fused_scan(
    step, state, tokens, name="linear_rule", interpret=interpret
  )
  return pallas_common.leave(outputs, state, u)
