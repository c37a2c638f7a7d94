"""A matrix state with a decay per channel and a rank-one erase.

Dimensions: B batch, H heads, T tokens, K key dim, E value dim.  Symbols as in
`reference.py`.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.common import scan
from pallas_kernels.generalized_delta_rule import one_chunk, reference, xla
from pallas_kernels.generalized_delta_rule.reference import (
  DeltaRuleOutput,
  Tokens,
)

Implementation = Literal["reference", "xla"]


def generalized_delta_rule(
  keys: jax.Array,
  values: jax.Array,
  *,
  queries: jax.Array,
  log_decay: jax.Array,
  erase_read: jax.Array,
  erase_write: jax.Array,
  weight: jax.Array,
  reset: jax.Array | None = None,
  chunk_length: int = 16,
  fastest_decay: float = one_chunk.FASTEST_DECAY,
  implementation: Implementation | None = None,
  checkpoint: scan.CheckpointPolicy = "sqrt",
) -> DeltaRuleOutput:
  """S_t = S_{t-1} (diag(w_t) + p_t b_t^T) + v_t k_t^T; reads o_t = S_t r_t.

  Source: RWKV-7, 2503.14456.  Everything is float32 (float64 if all is).

  Args:
    keys: k, [B, H, T, K].
    values: v, [B, H, T, E].
    queries: r, [B, H, T, K].
    log_decay: log w in -fastest_decay .. 0, [B, H, T, K]; values outside are
      clipped to the nearer bound and have no gradient.
    erase_read, erase_write: p and b, [B, H, T, K].
    weight: S before the first token, [B, H, E, K].
    reset: bool [B, H, T]: S is zeroed before the tokens where it is true.
    chunk_length: tokens per chunk; the result does not depend on it.
    fastest_decay: bound of -log_decay; a larger one needs shorter chunks.  With
      17 (chunks of 4) a token keeps less of a state than float32 resolves.
    implementation: "reference" (token loop), "xla"; None: the best, which is
      "xla" everywhere.
    checkpoint: what "xla" recomputes in its backward pass, see `scan.py`.

  Raises:
    ValueError: a shape or an option is wrong, or a chunk_length above
      `MAX_CHUNK_LENGTH` or too long for fastest_decay.
  """
  tokens = Tokens(
    keys, values, queries, log_decay, erase_read, erase_write, reset
  )
  _validate(tokens, weight)
  name = _choose(implementation)
  longest = one_chunk.longest_chunk(fastest_decay)
  if name == "xla" and not 0 < chunk_length <= longest:
    raise ValueError(
      f"{chunk_length=} is not in 1 .. {longest} for {fastest_decay=:.3g}"
    )
  log_decay = jnp.where(log_decay < -fastest_decay, -fastest_decay, log_decay)
  tokens = tokens._replace(log_decay=jnp.where(log_decay > 0, 0, log_decay))
  if name == "reference":
    return reference.generalized_delta_rule_reference(tokens, weight)
  return xla.generalized_delta_rule_xla(
    tokens,
    weight,
    chunk_length=chunk_length,
    fastest_decay=fastest_decay,
    checkpoint=checkpoint,
  )


def _choose(implementation: Implementation | None) -> Implementation:
  name = implementation or "xla"
  if name not in get_args(Implementation):
    known = ", ".join(map(repr, get_args(Implementation)))
    raise ValueError(f"{implementation=} is not one of {known}.")
  return name


def _validate(tokens: Tokens, weight: jax.Array) -> None:
  """Raises ValueError unless all shapes fit."""
  keys, values = tokens.keys, tokens.values
  if keys.ndim != 4 or 0 in keys.shape:
    raise ValueError(f"{keys.shape=} must be [B, H, T, K], none of them 0.")
  if values.ndim != 4 or values.shape[:3] != keys.shape[:3]:
    raise ValueError(f"{values.shape=} must be [B, H, T, E] for {keys.shape=}.")
  expected = {
    **dict.fromkeys(Tokens._fields[2:-1], keys.shape),
    "reset": keys.shape[:3],
    "weight": (*keys.shape[:2], values.shape[-1], keys.shape[-1]),
  }
  given = tokens._asdict() | {"weight": weight}
  for name, shape in expected.items():
    value = given[name]
    if value is not None and value.shape != shape:
      raise ValueError(
        f"{name}.shape={value.shape} must be {shape} for {keys.shape=},"
        f" {values.shape=}."
      )
