"""What the kernels share: one chunk of one head, and the way in and out.

Dimensions: B batch, H heads, T tokens, N chunks, C chunk length, K input width,
E output width.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import scan
from pallas_kernels.linear_rule import chunk as chunk_lib
from pallas_kernels.linear_rule import reference

Read = reference.Read
LinearRuleOutput = reference.LinearRuleOutput


class State(NamedTuple):
  """weight and momentum (None without), [..., E, K]."""

  weight: Any
  momentum: Any


class Tokens(NamedTuple):
  """x, queries (None: nothing is read) [..., C, K], u [..., C, E].

  rates: by name, [..., C] in float32; also `reset`, 0 or 1.
  """

  x: Any
  u: Any
  queries: Any
  rates: Any


@dataclasses.dataclass(frozen=True)
class Step:
  """One chunk of one head: state, tokens -> (what is read, the state after).

  The first `num_tokens` of all chunks' tokens exist.
  """

  read: Read
  num_tokens: int
  is_padded: bool
  arithmetic: chunk_lib.Arithmetic

  def __call__(
    self, shared: None, state: State, tokens: Tokens, index: jax.Array
  ) -> tuple[Any, State]:
    del shared
    rates, live = tokens.rates, None
    if self.is_padded:
      live = chunk_lib.live_tokens(index, tokens.x.shape[0], self.num_tokens)
    decays = chunk_lib.chunk_decays(
      rates["retention"],
      rates.get("momentum_decay"),
      live=live,
      reset=rates.get("reset"),
      read="pre" if tokens.queries is None else self.read,
      arithmetic=self.arithmetic,
    )
    out = chunk_lib.chunk_rule(
      tokens.x,
      tokens.u,
      weight=state.weight,
      momentum=state.momentum,
      decays=decays,
      learn_rate=rates["learn_rate"],
      erase=rates.get("erase"),
      queries=tokens.queries,
      read=self.read,
      arithmetic=self.arithmetic,
    )
    outputs = out.outputs
    if outputs is not None:
      outputs = outputs.astype(tokens.u.dtype)
    return outputs, State(out.weight, out.momentum)


def enter(
  x: jax.Array,
  u: jax.Array,
  *,
  weight: jax.Array,
  momentum: jax.Array | None,
  queries: jax.Array | None,
  chunk_length: int,
  **rates: jax.Array | None,
) -> tuple[State, Tokens]:
  """The arguments of `api.linear_rule` as states [B H, ...] in float32 and
  tokens [B H, N, C, ...], filled up with zeros."""

  def by_chunk(array: jax.Array) -> jax.Array:
    array = array.reshape(-1, *array.shape[2:])
    return scan.fold_chunks(array, chunk_length, 1)

  tokens = Tokens(
    x=by_chunk(x),
    u=by_chunk(u),
    queries=None if queries is None else by_chunk(queries),
    rates={
      name: by_chunk(rate.astype(jnp.float32))
      for name, rate in rates.items()
      if rate is not None
    },
  )
  state = jax.tree.map(
    lambda leaf: leaf.reshape(-1, *leaf.shape[2:]).astype(jnp.float32),
    State(weight, momentum),
  )
  return state, tokens


def leave(outputs: Any, state: Any, like: jax.Array) -> LinearRuleOutput:
  """What the kernels return in the shapes of `api.linear_rule`, whose `u` is
  `like` [B, H, T, E]."""
  batch, heads, num_tokens, width = like.shape
  if outputs is not None:
    outputs = outputs.reshape(batch, heads, -1, width)[:, :, :num_tokens]
  state = jax.tree.map(
    lambda leaf: leaf.reshape(batch, heads, *leaf.shape[1:]), state
  )
  return LinearRuleOutput(outputs, *state)
