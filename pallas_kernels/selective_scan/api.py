"""A state per channel, every number of it with its own decay.

Dimensions: B batch, T tokens, E channels, K numbers per channel.  Symbols as in
`reference.py`.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.common import scan
from pallas_kernels.selective_scan import reference, xla
from pallas_kernels.selective_scan.reference import ScanOutput, Tokens

Implementation = Literal["reference", "xla"]


def selective_scan(
  values: jax.Array,
  step_size: jax.Array,
  *,
  keys: jax.Array,
  queries: jax.Array,
  decay_rate: jax.Array,
  state: jax.Array,
  reset: jax.Array | None = None,
  chunk_length: int = 64,
  implementation: Implementation | None = None,
  checkpoint: scan.CheckpointPolicy = "chunk",
) -> ScanOutput:
  """h_t = exp(-s_t A) h_{t-1} + s_t x_t k_t^T; reads o_t = h_t q_t.

  Source: Mamba, 2312.00752.  Computed in the state's dtype.

  Args:
    values, step_size: x and s, [B, T, E].
    keys, queries: k and q, [B, T, K], the same for all channels.
    decay_rate: A > 0, [E, K].
    state: h before the first token, [B, E, K].
    reset: bool [B, T]; where true, the state is zeroed before the token.
    chunk_length: tokens per chunk; the result does not depend on it.
    implementation: "reference" (token loop), "xla"; None: the best, which is
      "xla" everywhere.
    checkpoint: what "xla" recomputes in its backward pass, see `scan.py`.

  Raises:
    ValueError: a shape or an option is wrong.
  """
  if reset is None:
    reset = jnp.zeros(values.shape[:2], bool)
  _validate(Tokens(values, step_size, keys, queries, reset), decay_rate, state)
  name = implementation or "xla"
  if name not in get_args(Implementation):
    known = ", ".join(map(repr, get_args(Implementation)))
    raise ValueError(f"{implementation=} is not one of {known}.")
  if chunk_length < 1:
    raise ValueError(f"{chunk_length=} must be at least 1.")
  cast = lambda x: x.astype(state.dtype)
  decay_rate = cast(decay_rate)
  tokens = Tokens(
    cast(values), cast(step_size), cast(keys), cast(queries), reset
  )
  if name == "reference":
    return reference.selective_scan_reference(tokens, decay_rate, state)
  return xla.selective_scan_xla(
    tokens,
    decay_rate,
    state,
    chunk_length=chunk_length,
    checkpoint=checkpoint,
  )


def _validate(tokens: Tokens, decay_rate: jax.Array, state: jax.Array) -> None:
  """Raises ValueError unless all shapes fit."""
  values, keys = tokens.values, tokens.keys
  if values.ndim != 3 or 0 in values.shape:
    raise ValueError(f"{values.shape=} must be [B, T, E], none of them 0.")
  if keys.ndim != 3 or keys.shape[:2] != values.shape[:2]:
    raise ValueError(f"{keys.shape=} must be [B, T, K] for {values.shape=}.")
  sizes = values.shape[2], keys.shape[2]
  expected = {
    "step_size": (tokens.step_size, values.shape),
    "queries": (tokens.queries, keys.shape),
    "reset": (tokens.reset, values.shape[:2]),
    "decay_rate": (decay_rate, sizes),
    "state": (state, (values.shape[0], *sizes)),
  }
  for name, (value, shape) in expected.items():
    if value.shape != shape:
      raise ValueError(
        f"{name}.shape={value.shape} must be {shape} for {values.shape=},"
        f" {keys.shape=}."
      )
