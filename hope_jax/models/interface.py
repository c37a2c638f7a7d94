"""What every sequence layer returns.

A sequence layer is a Linen module with
`__call__(x_BTD, state, segments) -> MixerOutput` and, beside it, a function
`init_state(config, batch_size, piece_length)`.  Without a state it starts a
sequence and returns none; with a state it continues one, so that training,
prefill, decoding and sessions are one code path.
"""

from typing import Any, NamedTuple

import jax


class MixerOutput(NamedTuple):
  """y [B, T, D]; its keys and values k_t, v_t [B, T, D] for the CMS (heads
  side by side); the new state."""

  y: jax.Array
  keys: jax.Array
  values: jax.Array
  state: Any
