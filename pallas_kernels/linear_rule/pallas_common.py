"""Shared by the kernels: the step function and the argument layout.

Dimensions: B batch, H heads, T tokens, N chunks, C chunk length, K input width,
E output width.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import scan
from pallas_kernels.linear_rule import one_chunk
from pallas_kernels.linear_rule.reference import (
  LinearRuleOutput,
  Rates,
  Read,
  State,
  Tokens,
)


class Chunks(NamedTuple):
  """What a kernel reads of a head: [..., C, ...], rates in float32 (including
  `reset`: 0 or 1)."""

  tokens: Tokens
  rates: Rates

  def with_u(self, u: Any) -> "Chunks":
    """The same with another u."""
    return self._replace(tokens=self.tokens._replace(u=u))

  def without_queries(self) -> "Chunks":
    """The same without queries."""
    return self._replace(tokens=self.tokens._replace(queries=None))


@dataclasses.dataclass(frozen=True)
class Step:
  """One chunk of one head: state, chunk -> (what is read, the state after).

  The first `num_tokens` tokens of all chunks are real; the rest is padding.
  """

  read: Read
  num_tokens: int
  is_padded: bool
  arithmetic: one_chunk.Arithmetic

  def __call__(
    self, shared: None, state: State, chunk: Chunks, index: jax.Array
  ) -> tuple[jax.Array | None, State]:
    del shared
    (tokens, rates), live = chunk, None
    if self.is_padded:
      live = one_chunk.live_tokens(index, tokens.x.shape[0], self.num_tokens)
    decays = one_chunk.chunk_decays(
      rates.retention,
      rates.momentum_decay,
      live=live,
      reset=rates.reset,
      read="pre" if tokens.queries is None else self.read,
      arithmetic=self.arithmetic,
    )
    out = one_chunk.chunk_rule(
      tokens,
      state,
      decays=decays,
      step_size=rates.step_size,
      erase=rates.erase,
      read=self.read,
      arithmetic=self.arithmetic,
    )
    outputs = out.outputs
    if outputs is not None:
      outputs = outputs.astype(tokens.u.dtype)
    return outputs, State(out.weight, out.momentum)


def to_kernel_layout(
  tokens: Tokens, rates: Rates, state: State, *, chunk_length: int
) -> tuple[Chunks, State]:
  """The arguments of `api.linear_rule` as tokens and rates [B H, N, C, ...],
  padded with zeros, and states [B H, ...] in float32."""

  def by_chunk(array: jax.Array) -> jax.Array:
    array = array.reshape(-1, *array.shape[2:])
    return scan.fold_chunks(array, chunk_length, 1)

  chunks = Chunks(
    jax.tree.map(by_chunk, tokens),
    jax.tree.map(lambda rate: by_chunk(rate.astype(jnp.float32)), rates),
  )
  by_head = jax.tree.map(
    lambda leaf: leaf.reshape(-1, *leaf.shape[2:]).astype(jnp.float32), state
  )
  return chunks, by_head


def from_kernel_layout(
  outputs: jax.Array | None, state: State, like: jax.Array
) -> LinearRuleOutput:
  """The kernels' results in the shapes of `api.linear_rule`; `like` is its `u`,
  [B, H, T, E]."""
  batch, heads, num_tokens, width = like.shape
  if outputs is not None:
    outputs = outputs.reshape(batch, heads, -1, width)[:, :, :num_tokens]
  state = jax.tree.map(
    lambda leaf: leaf.reshape(batch, heads, *leaf.shape[1:]), state
  )
  return LinearRuleOutput(outputs, *state)
