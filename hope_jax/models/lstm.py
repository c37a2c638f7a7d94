"""LSTM: a gated recurrence of the model's width (Table 5).

  i, f, g, o = n_t W + h_{t-1} U + b
  c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
  y_t = h_t = sigmoid(o) tanh(c_t)

It sits in the same block as all other layers.  Sources: Hochreiter and
Schmidhuber 1997; Gers et al. 2000 for the forget gate, whose bias starts at 1.
W starts as LeCun's normal, U orthogonal.  Linen's cells have neither that bias
nor documents, so the recurrence is written out here; n W is one product for all
tokens, and the loop has only h U.

Legend: B batch, T tokens, D model.
"""

from fractions import Fraction

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree

from hope_jax.config import ModelConfig
from hope_jax.models import layers
from hope_jax.models.interface import FastState, MixerOutput, Problem, owned
from hope_jax.models.parameters import parameter


@flax.struct.dataclass
class Cell:
  """c and h, [B, D]."""

  cell: jax.Array
  hidden: jax.Array


@flax.struct.dataclass
class LSTMState(FastState):
  """The recurrence after the last token."""

  memory: Cell = owned("memory")


def init_state(
  config: ModelConfig, batch_size: int, read_size: int | None = None
) -> LSTMState:
  """c = h = 0, [B, D]."""
  del read_size
  zero = jnp.zeros((batch_size, config.width), jnp.float32)
  return LSTMState(Cell(zero, zero))


def _bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """0, but 1 for the forget gate."""
  gate = jnp.arange(4).repeat(shape[0] // 4)
  return (gate == 1).astype(jnp.float32)


class LSTM(nn.Module):
  """One layer of an LSTM."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: LSTMState | None = None,
    documents: jax.Array | None = None,
  ) -> MixerOutput:
    cfg, width = self.config, self.config.width
    recurrent = parameter(
      self,
      "recurrent_kernel",
      nn.initializers.orthogonal(),
      (width, 4 * width),
      ("embed", "heads"),
    )
    bias = parameter(self, "recurrent_bias", _bias, (4 * width,), ("heads",))
    projected = layers.dense(
      4 * width,
      cfg,
      ("embed", "heads"),
      "projections",
      kernel_init=nn.initializers.lecun_normal(),
    )(x_BTD)
    recurrent = recurrent.astype(projected.dtype)

    def step(state: Cell, token: Tree) -> tuple[Cell, jax.Array]:
      x, is_new = token
      if is_new is not None:
        state = jax.tree.map(lambda s: jnp.where(is_new[:, None], 0, s), state)
      z = x + jnp.dot(state.hidden.astype(x.dtype), recurrent)
      z = z.astype(jnp.float32) + bias[None]
      # Without this, gradients are wrong on a mesh with all three axes.
      z = nn.with_logical_constraint(z, ("batch", "gates"))
      i, f, g, o = jnp.split(z, 4, axis=-1)
      cell = nn.sigmoid(f) * state.cell + nn.sigmoid(i) * jnp.tanh(g)
      hidden = nn.sigmoid(o) * jnp.tanh(cell)
      return Cell(cell, hidden), hidden.astype(x.dtype)

    start = (state or init_state(cfg, x_BTD.shape[0])).memory
    reset = None if documents is None else layers.document_starts(documents)
    by_token = lambda x: x.swapaxes(0, 1)
    with jax.named_scope("recurrence"):
      end, y = jax.lax.scan(
        step, start, jax.tree.map(by_token, (projected, reset))
      )
    y_BTD = by_token(y)
    # Placeholders: it has no pairs for a CMS, which the config rules out.
    return MixerOutput(y_BTD, y_BTD, y_BTD, state and LSTMState(end))


def describe(config: ModelConfig) -> list[Problem]:
  """See `models/interface.py`."""
  del config
  problem = Problem(
    name="memory",
    frequency=Fraction(1),
    context="n, h of the last token",
    objective="none: a gated recurrence",
    rule="c <- f c + i tanh(g); h <- o tanh(c)",
    transfer="starts at zero; gates by slow projections of n and h",
  )
  return [problem]
