"""The learning rule as TPU kernels: `fused_scan` over the chunks of a head."""

from typing import Any

from pallas_kernels.common import fused_scan
from pallas_kernels.linear_rule import one_chunk, pallas_common
from pallas_kernels.linear_rule.reference import (
  LinearRuleOutput,
  Rates,
  Read,
  State,
  Tokens,
)


def linear_rule_tpu(
  tokens: Tokens,
  rates: Rates,
  state: State,
  *,
  read: Read = "pre",
  chunk_length: int,
  interpret: Any = False,
) -> LinearRuleOutput:
  """`api.linear_rule` on a TPU, in float32.

  interpret: as in `pl.pallas_call`; runs the kernels on any backend, slowly.
  """
  num_tokens = tokens.x.shape[2]
  chunk_length = min(chunk_length, num_tokens)
  by_chunk, by_head = pallas_common.to_kernel_layout(
    tokens, rates, state, chunk_length=chunk_length
  )
  step = pallas_common.Step(
    read,
    num_tokens,
    num_tokens % chunk_length > 0,
    one_chunk.Arithmetic(in_kernel=True),
  )
  outputs, by_head = fused_scan.fused_scan(
    step, by_head, by_chunk, name="linear_rule", interpret=interpret
  )
  return pallas_common.from_kernel_layout(outputs, by_head, tokens.u)
