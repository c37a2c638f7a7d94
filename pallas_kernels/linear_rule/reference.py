"""The learning rule of a linear fast weight, token by token.

  W, S <- 0                                            where reset_t
  S_t = beta_t S_{t-1} - eta'_t u_t x_t^T
  W_t = W_{t-1} (alpha_t I - delta_t x_t x_t^T) + S_t
  y_t = W_{t-1} q_t  (read = "pre")  or  W_t q_t  (read = "post")

This file is the definition (docs/equations.md, "The learning rule"); the other
implementations compute the same by chunks.

Dimensions: B batch, H heads, T tokens, K input width, E output width. The
paper's symbols: alpha = retention, beta = momentum_decay, eta' = step_size,
delta = erase, W = weight, S = momentum, u = output error dL/dy.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Read = Literal["pre", "post"]


class Tokens(NamedTuple):
  """x, queries (None: nothing is read) [..., T, K]; u [..., T, E]."""

  x: jax.Array
  u: jax.Array
  queries: jax.Array | None = None


class Rates(NamedTuple):
  """Scalars of every token, [..., T]; None: no momentum, erase, resets."""

  retention: jax.Array
  momentum_decay: jax.Array | None
  step_size: jax.Array
  erase: jax.Array | None
  reset: jax.Array | None = None


class State(NamedTuple):
  """weight and momentum (None: writes are not carried on), [..., E, K]."""

  weight: jax.Array
  momentum: jax.Array | None


class LinearRuleOutput(NamedTuple):
  """What the queries read, and the state after the last token."""

  outputs: jax.Array | None  # [B, H, T, E]; None without queries
  weight: jax.Array  # [B, H, E, K], at least float32
  momentum: jax.Array | None  # [B, H, E, K], at least float32


def state_dtype(*trees: Any) -> jnp.dtype:
  """The dtype of state and arithmetic: float32, or float64 if any array is."""
  return jnp.result_type(jnp.float32, *jax.tree.leaves(trees))


def linear_rule_reference(
  tokens: Tokens, rates: Rates, state: State, *, read: Read = "pre"
) -> LinearRuleOutput:
  """Runs `api.linear_rule` over the tokens of each head, one at a time.

  Without momentum S_t is the write -eta'_t u_t x_t^T alone.
  """
  dtype = state_dtype(tokens, rates, state)
  cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)

  def step(state, token):
    (w_BHEK, s_BHEK), ((x_BHK, u_BHE, q_BHK), rates_BH) = state, token
    if rates_BH.reset is not None:
      reset_BH11 = rates_BH.reset[..., None, None]
      w_BHEK = jnp.where(reset_BH11, 0, w_BHEK)
      s_BHEK = None if s_BHEK is None else jnp.where(reset_BH11, 0, s_BHEK)

    error_BHE = rates_BH.step_size[..., None] * u_BHE
    write_BHEK = -jnp.einsum("BHE,BHK->BHEK", error_BHE, x_BHK)
    if s_BHEK is not None:
      s_BHEK = rates_BH.momentum_decay[..., None, None] * s_BHEK + write_BHEK
      write_BHEK = s_BHEK

    next_BHEK = rates_BH.retention[..., None, None] * w_BHEK + write_BHEK
    if rates_BH.erase is not None:
      r_BHE = jnp.einsum("BHEK,BHK->BHE", w_BHEK, x_BHK)
      erased_BHE = rates_BH.erase[..., None] * r_BHE
      next_BHEK -= jnp.einsum("BHE,BHK->BHEK", erased_BHE, x_BHK)

    y_BHE = None
    if q_BHK is not None:
      source_BHEK = w_BHEK if read == "pre" else next_BHEK
      y_BHE = jnp.einsum("BHEK,BHK->BHE", source_BHEK, q_BHK)
    return (next_BHEK, s_BHEK), y_BHE

  by_token = jax.tree.map(
    lambda leaf: jnp.moveaxis(leaf, 2, 0),
    (cast(tokens), cast(rates)._replace(reset=rates.reset)),
  )
  (weight, momentum), outputs = jax.lax.scan(step, tuple(cast(state)), by_token)
  if outputs is not None:
    outputs = jnp.moveaxis(outputs, 0, 2).astype(tokens.u.dtype)
  return LinearRuleOutput(outputs, weight, momentum)
