"""LSTM: a gated recurrence, read and written token by token (Table 5).

  i, f, g, o = n_t W + h_{t-1} U + b
  c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
  y_t = h_t = sigmoid(o) tanh(c_t)

of the model's width, in the same block as all others (Hochreiter and
Schmidhuber 1997; forget gate: Gers et al. 2000, its bias starts at 1).  W
starts as LeCun's normal, U orthogonal.  Linen's cells know neither that bias
nor documents, so that the recurrence stands here; all tokens share one product
n W, the loop has only h U.

Legend: B batch, T tokens, D model.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hope_jax.config import ModelConfig
from hope_jax.models import layers
from hope_jax.models.interface import MixerOutput
from hope_jax.models.linear import document_starts


def init_state(
  config: ModelConfig, batch_size: int, piece_length: int | None = None
) -> dict[str, Any]:
  """c = h = 0, [B, D]."""
  del piece_length
  zero = jnp.zeros((batch_size, config.width), jnp.float32)
  return {"memory": {"cell": zero, "hidden": zero}}


def _bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """0, of the forget gate 1."""
  gate = jnp.arange(4).repeat(shape[0] // 4)
  return (gate == 1).astype(jnp.float32)


class LSTM(nn.Module):
  """One layer of an LSTM."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: dict[str, Any] | None = None,
    segments: jax.Array | None = None,
  ) -> MixerOutput:
    cfg, width = self.config, self.config.width
    box = nn.with_logical_partitioning
    recurrent: Any = self.param(
      "recurrent_kernel",
      box(nn.initializers.orthogonal(), ("embed", "heads")),
      (width, 4 * width),
    )
    bias: Any = self.param(
      "recurrent_bias", box(_bias, ("heads",)), (4 * width,)
    )
    projected = layers.dense(
      4 * width,
      cfg,
      ("embed", "heads"),
      "projections",
      kernel_init=nn.initializers.lecun_normal(),
    )(x_BTD)
    recurrent = recurrent.astype(projected.dtype)

    def step(state: dict[str, Any], token: Any) -> tuple[Any, jax.Array]:
      x, is_new = token
      if is_new is not None:
        state = jax.tree.map(lambda s: jnp.where(is_new[:, None], 0, s), state)
      z = x + jnp.dot(state["hidden"].astype(x.dtype), recurrent)
      z = z.astype(jnp.float32) + bias[None]
      # Left to the compiler, gradients are wrong on a mesh of all three axes.
      z = nn.with_logical_constraint(z, ("batch", "gates"))
      i, f, g, o = jnp.split(z, 4, axis=-1)
      cell = nn.sigmoid(f) * state["cell"] + nn.sigmoid(i) * jnp.tanh(g)
      hidden = nn.sigmoid(o) * jnp.tanh(cell)
      return {"cell": cell, "hidden": hidden}, hidden.astype(x.dtype)

    start = (state or init_state(cfg, x_BTD.shape[0]))["memory"]
    reset = None if segments is None else document_starts(segments)
    by_token = lambda x: x.swapaxes(0, 1)
    with jax.named_scope("recurrence"):
      end, y = jax.lax.scan(
        step, start, jax.tree.map(by_token, (projected, reset))
      )
    y_BTD = by_token(y)
    # There are no pairs for a CMS, which the config refuses.
    return MixerOutput(y_BTD, y_BTD, y_BTD, state and {"memory": end})
