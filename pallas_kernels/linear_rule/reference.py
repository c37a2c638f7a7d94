"""The learning rule of a linear fast weight, token by token (spec 02, eq. P).

This file is the definition; `chunked.py` computes the same by chunks.

Dimensions: B batch, H heads, T tokens, K input width, E output width. The
paper's symbols: alpha = retention, beta = momentum_decay, eta = learn_rate,
delta = erase, W = weight, S = momentum, u = output error dL/dy.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Read = Literal["pre", "post"]


class LinearRuleOutput(NamedTuple):
  """What the queries read, and the state after the last token."""

  outputs: jax.Array | None  # [B, H, T, E]; None without queries
  weight: jax.Array  # [B, H, E, K], at least float32
  momentum: jax.Array | None  # [B, H, E, K], at least float32


def state_dtype(*trees) -> jnp.dtype:
  """The dtype of state and arithmetic: float32, or float64 if any array is."""
  return jnp.result_type(jnp.float32, *jax.tree.leaves(trees))


def linear_rule_reference(
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
) -> LinearRuleOutput:
  """Runs `api.linear_rule` over the tokens of each head, one at a time.

  Equations and shapes stand there.  Without momentum S_t is the write
  -eta_t u_t x_t^T alone.
  """
  tokens = dict(
    x=x,
    u=u,
    retention=retention,
    momentum_decay=momentum_decay,
    learn_rate=learn_rate,
    erase=erase,
    queries=queries,
  )
  dtype = state_dtype(weight, tokens)
  tokens = jax.tree.map(lambda leaf: leaf.astype(dtype), tokens)
  tokens["reset"] = reset

  def step(state, token):
    w_BHEK, s_BHEK = state
    x_BHK, u_BHE, q_BHK = token["x"], token["u"], token["queries"]
    if reset is not None:
      reset_BH11 = token["reset"][..., None, None]
      w_BHEK = jnp.where(reset_BH11, 0, w_BHEK)
      s_BHEK = None if s_BHEK is None else jnp.where(reset_BH11, 0, s_BHEK)

    error_BHE = token["learn_rate"][..., None] * u_BHE
    write_BHEK = -jnp.einsum("BHE,BHK->BHEK", error_BHE, x_BHK)
    if s_BHEK is not None:
      s_BHEK = token["momentum_decay"][..., None, None] * s_BHEK + write_BHEK
      write_BHEK = s_BHEK

    next_BHEK = token["retention"][..., None, None] * w_BHEK + write_BHEK
    if erase is not None:
      r_BHE = jnp.einsum("BHEK,BHK->BHE", w_BHEK, x_BHK)
      erased_BHE = token["erase"][..., None] * r_BHE
      next_BHEK -= jnp.einsum("BHE,BHK->BHEK", erased_BHE, x_BHK)

    y_BHE = None
    if q_BHK is not None:
      source_BHEK = w_BHEK if read == "pre" else next_BHEK
      y_BHE = jnp.einsum("BHEK,BHK->BHE", source_BHEK, q_BHK)
    return (next_BHEK, s_BHEK), y_BHE

  state = (
    weight.astype(dtype),
    None if momentum is None else momentum.astype(dtype),
  )
  by_token = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 2, 0), tokens)
  (weight, momentum), outputs = jax.lax.scan(step, state, by_token)
  if outputs is not None:
    outputs = jnp.moveaxis(outputs, 0, 2).astype(u.dtype)
  return LinearRuleOutput(outputs, weight, momentum)
