"""Mamba's recurrence, token by token.

  h_t = exp(-s_t A) h_{t-1} + s_t x_t k_t^T;   o_t = h_t q_t

elementwise in exp(-s A) [E, K] (2312.00752, section 3; there s, k, q are dt, B,
C); h_{t-1} is 0 where reset_t.  This file is the definition (docs/equations.md,
"The selective scan"); `xla.py` computes the same by chunks.

Dimensions: B batch, T tokens, E channels, K numbers per channel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tokens(NamedTuple):
  """x, s [B, T, E]; k, q [B, T, K]; resets [B, T]."""

  values: jax.Array
  step_size: jax.Array
  keys: jax.Array
  queries: jax.Array
  reset: jax.Array


class ScanOutput(NamedTuple):
  """o [B, T, E]; the state after the last token [B, E, K]."""

  outputs: jax.Array
  state: jax.Array


def selective_scan_reference(
  tokens: Tokens, decay_rate: jax.Array, state: jax.Array
) -> ScanOutput:
  """Runs `api.selective_scan`, one token at a time."""

  def step(h_BEK: jax.Array, token: Tokens) -> tuple[jax.Array, jax.Array]:
    x_BE, s_BE, k_BK, q_BK, is_new_B = token
    h_BEK = jnp.where(is_new_B[:, None, None], 0, h_BEK)
    h_BEK = jnp.exp(-s_BE[..., None] * decay_rate[None]) * h_BEK
    h_BEK += jnp.einsum("BE,BK->BEK", s_BE * x_BE, k_BK)
    return h_BEK, jnp.einsum("BEK,BK->BE", h_BEK, q_BK)

  by_token = jax.tree.map(lambda x: x.swapaxes(0, 1), tokens)
  state, outputs = jax.lax.scan(step, state, by_token)
  return ScanOutput(outputs.swapaxes(0, 1), state)
