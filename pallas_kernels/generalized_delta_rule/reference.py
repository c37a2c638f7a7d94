"""The generalized delta rule, token by token.

  S_t = S_{t-1} (diag(w_t) + p_t b_t^T) + v_t k_t^T,    o_t = S_t r_t

with a decay w_t per key channel; p and b form the erase (-kappa and a kappa in
RWKV-7), which reads S_{t-1} before it decays.  This file is the definition
(docs/equations.md, "The generalized delta rule"); `xla.py` computes the same by
chunks.

Source: RWKV-7, 2503.14456.

Dimensions: B batch, H heads, T tokens, K key dim, E value dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tokens(NamedTuple):
  """k, r, log w, p, b [B, H, T, K] and v [B, H, T, E]; resets [B, H, T] or
  None."""

  keys: jax.Array
  values: jax.Array
  queries: jax.Array
  log_decay: jax.Array
  erase_read: jax.Array
  erase_write: jax.Array
  reset: jax.Array | None


class DeltaRuleOutput(NamedTuple):
  """o [B, H, T, E] and the state after the last token [B, H, E, K]."""

  outputs: jax.Array
  weight: jax.Array


def generalized_delta_rule_reference(
  tokens: Tokens, weight: jax.Array
) -> DeltaRuleOutput:
  """Runs `api.generalized_delta_rule`, one token at a time."""

  def step(w_BHEK, token):
    k, v, r, log_w, p, b, is_new = token
    if is_new is not None:
      w_BHEK = jnp.where(is_new[..., None, None], 0, w_BHEK)
    read_BHE = jnp.einsum("BHEK,BHK->BHE", w_BHEK, p)
    w_BHEK = w_BHEK * jnp.exp(log_w)[:, :, None]
    w_BHEK += jnp.einsum("BHE,BHK->BHEK", read_BHE, b)
    w_BHEK += jnp.einsum("BHE,BHK->BHEK", v, k)
    return w_BHEK, jnp.einsum("BHEK,BHK->BHE", w_BHEK, r)

  by_token = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), tokens)
  weight, outputs = jax.lax.scan(step, weight, by_token)
  return DeltaRuleOutput(jnp.moveaxis(outputs, 0, 2), weight)
