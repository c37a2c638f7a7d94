"""A self-referential weight matrix: it makes its own keys, queries and rates.

Per head, with phi = softmax and x_t the head's part of the layer's input:

  y_t, k_t, q_t, b_t = W_{t-1} phi(x_t)
  W_t = W_{t-1} + sigmoid(b_t) (W_{t-1} phi(q_t) - W_{t-1} phi(k_t)) phi(k_t)^T

W [3 K + 4, K] is all four parts one above the other; b_t are four numbers, the
learn rate of each.  The layer's output is W_o y_t of all heads.  W_0 is a slow
parameter; without writes (the twin) y_t = W_0 phi(x_t).

Source: Irie et al. 2022, 2202.05780, and their code (IDSIA/
modern-srwm), whose initial values these are: N(0, 1/K), for what makes q
N(0, 1e-4/K).  Every token's write is nonlinear in the state: a loop over the
tokens, whose backward pass recomputes (`pallas_kernels/common/scan.py`).

Legend: B batch, T tokens, D model, H heads, K head dim, R = 3 K + 4 rows.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hope_jax.memory import deep
from hope_jax.memory.architectures import Weights
from hope_jax.model_config import ModelConfig
from hope_jax.models import layers
from hope_jax.models.interface import MixerOutput
from hope_jax.models.linear import document_starts
from pallas_kernels.common.scan import checkpointed_scan


def num_rows(config: ModelConfig) -> int:
  """Rows of W: y, k and q of a head, four rates."""
  return 3 * config.head_dim + 4


def init_state(
  config: ModelConfig, batch_size: int, piece_length: int | None = None
) -> dict[str, Any]:
  """D = W - W_0 = 0; it is written at every token, whatever the piece."""
  del piece_length
  shape = batch_size, config.num_heads, num_rows(config), config.head_dim
  return _state(jnp.zeros(shape, jnp.float32))


def _state(difference: jax.Array) -> dict[str, Any]:
  return {"memory": {"weight": Weights(None, difference)}}


class InitialMatrix(nn.Module):
  """W_0, [H, R, K]."""

  config: ModelConfig

  @nn.compact
  def __call__(self) -> Any:
    dim, rows = self.config.head_dim, num_rows(self.config)

    def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
      row = jnp.arange(rows)
      makes_query = (row >= 2 * dim) & (row < 3 * dim)
      std = jnp.where(makes_query, 0.01, 1.0) * dim**-0.5
      return jax.random.normal(key, shape) * std[None, :, None]

    box = nn.with_logical_partitioning(
      init, ("heads", "memory_out", "memory_in")
    )
    shape = self.config.num_heads, rows, dim
    return self.param("memory_output", box, shape)


class SelfReferentialMatrix(nn.Module):
  """The sequence layer."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: dict[str, Any] | None = None,
    segments: jax.Array | None = None,
  ) -> MixerOutput:
    cfg = self.config
    initial = InitialMatrix(cfg, name="initial")()
    start = state or init_state(cfg, x_BTD.shape[0])
    difference = start["memory"]["weight"].output
    x = nn.softmax(layers.split_heads(x_BTD, cfg.num_heads))
    if cfg.is_live("memory"):
      reset = None if segments is None else document_starts(segments)
      difference, y = checkpointed_scan(
        _step(initial, cfg.head_dim),
        difference,
        jax.tree.map(_by_token, (x, reset)),
        policy=cfg.memory.remat,
      )
      y = jnp.moveaxis(y, 0, 2)
    else:
      y = jnp.einsum("BHTK,HRK->BHTR", x, initial[:, : cfg.head_dim])
    if layers.wants_dynamics(self):
      weights = Weights(None, initial), Weights(None, difference)
      change = {"relative_change": deep.relative_change(*weights)}
      layers.sow_dynamics(self, "memory", change)
    y = layers.merge_heads(y)
    y_BTD = layers.dense(
      cfg.width, cfg, ("heads", "embed"), "output", is_output=True
    )(y)
    # There are no pairs for a CMS, which the config refuses.
    return MixerOutput(y_BTD, y_BTD, y_BTD, state and _state(difference))


def _by_token(x: jax.Array) -> jax.Array:
  """[B, H, T, K] or [B, T] -> T first."""
  return jnp.moveaxis(x, 2 if x.ndim == 4 else 1, 0)


def _step(initial: jax.Array, dim: int) -> Any:
  """(D, (phi(x) [B, H, K], is first of a document [B])) -> (D, y)."""

  def step(d_BHRK: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
    x_BHK, is_new = token
    if is_new is not None:
      d_BHRK = jnp.where(is_new[:, None, None, None], 0, d_BHRK)
    w_BHRK = initial[None] + d_BHRK
    read = lambda k: jnp.einsum("BHRK,BHK->BHR", w_BHRK, k)
    parts = jnp.split(read(x_BHK), [dim, 2 * dim, 3 * dim], axis=-1)
    y_BHK, k_BHK, q_BHK, rates = parts
    k_BHK, q_BHK = nn.softmax(k_BHK), nn.softmax(q_BHK)
    sizes = jnp.array([dim, dim, dim, 4])
    rate_BHR = jnp.repeat(
      nn.sigmoid(rates), sizes, axis=-1, total_repeat_length=3 * dim + 4
    )
    error_BHR = rate_BHR * (read(q_BHK) - read(k_BHK))
    write_BHRK = jnp.einsum("BHR,BHK->BHRK", error_BHR, k_BHK)
    return d_BHRK + write_BHRK, y_BHK

  return step
