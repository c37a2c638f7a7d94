"""A self-referential weight matrix that makes its own keys, queries and rates.

Per head, with phi = softmax and x_t the head's part of the layer's input:

  y_t, k_t, q_t, b_t = W_{t-1} phi(x_t)
  W_t = W_{t-1} + sigmoid(b_t) (W_{t-1} phi(q_t) - W_{t-1} phi(k_t)) phi(k_t)^T

W [3 K + 4, K] stacks the rows of the four parts that make y, k, q and b; the
four numbers b_t give each part its learn rate.  The layer's output is W_o
applied to y_t of all heads.  W_0 is a slow parameter; without writes (the twin)
y_t = W_0 phi(x_t).

Source: Irie et al. 2022, 2202.05780, and their code (IDSIA/modern-srwm), which
gives the initial values: normal with variance 1/K, or 1e-4/K in the rows that
make q.  Every token's write is nonlinear in the state, so the layer loops over
the tokens; the backward pass recomputes (`pallas_kernels/common/scan.py`).

Legend: B batch, T tokens, D model, H heads, K head dim, R = 3 K + 4 rows.
"""

from collections.abc import Mapping
from fractions import Fraction

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree

from hope_jax.config import ModelConfig
from hope_jax.memory import chunks
from hope_jax.memory import dynamics as dynamics_lib
from hope_jax.memory.architectures import Weights
from hope_jax.models import layers
from hope_jax.models.interface import (
  META_LEARNED,
  FastState,
  Level,
  MixerOutput,
  Problem,
  owned,
)
from hope_jax.models.parameters import parameter
from pallas_kernels.common.scan import checkpointed_scan


def num_rows(config: ModelConfig) -> int:
  """Number of rows of W: those of y, k and q, and four of rates."""
  return 3 * config.head_dim + 4


@flax.struct.dataclass
class SRWMState(FastState):
  """D = W - W_0, [B, H, R, K]."""

  memory: chunks.Fast = owned("memory")

  def fast_levels(
    self, initial: Mapping[str, Tree], config: ModelConfig
  ) -> dict[str, Level]:
    """See `FastState`."""
    del config
    start = Weights(None, initial["memory_output"])
    return {"memory": Level(start, self.memory.weight, None)}

  def reset(self, level: str, config: ModelConfig) -> "SRWMState":
    """See `FastState`."""
    if level != "memory":
      return super().reset(level, config)
    return SRWMState(jax.tree.map(jnp.zeros_like, self.memory))


def init_state(
  config: ModelConfig, batch_size: int, read_size: int | None = None
) -> SRWMState:
  """D = W - W_0 = 0; every token writes, so `read_size` does not matter."""
  del read_size
  shape = batch_size, config.num_heads, num_rows(config), config.head_dim
  return _state(jnp.zeros(shape, jnp.float32))


def _state(difference: jax.Array) -> SRWMState:
  return SRWMState(chunks.Fast(Weights(None, difference)))


class InitialMatrix(nn.Module):
  """W_0, [H, R, K]."""

  config: ModelConfig

  @nn.compact
  def __call__(self) -> Tree:
    dim, rows = self.config.head_dim, num_rows(self.config)

    def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
      row = jnp.arange(rows)
      makes_query = (row >= 2 * dim) & (row < 3 * dim)
      std = jnp.where(makes_query, 0.01, 1.0) * dim**-0.5
      return jax.random.normal(key, shape) * std[None, :, None]

    return parameter(
      self,
      "memory_output",
      init,
      (self.config.num_heads, rows, dim),
      ("heads", "memory_out", "memory_in"),
      role="initial",
      owner=("memory",),
    )


class SelfReferentialMatrix(nn.Module):
  """The sequence layer."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: SRWMState | None = None,
    documents: jax.Array | None = None,
  ) -> MixerOutput:
    cfg = self.config
    initial = InitialMatrix(cfg, name="initial")()
    start = state or init_state(cfg, x_BTD.shape[0])
    difference = start.memory.weight.output
    x = nn.softmax(layers.split_heads(x_BTD, cfg.num_heads))
    if cfg.is_live("memory"):
      reset = None if documents is None else layers.document_starts(documents)
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
      change = {"relative_change": dynamics_lib.relative_change(*weights)}
      layers.sow_dynamics(self, "memory", change)
    y = layers.merge_heads(y)
    y_BTD = layers.dense(
      cfg.width, cfg, ("heads", "embed"), "output", is_output=True
    )(y)
    # Placeholders: it has no pairs for a CMS, which the config rules out.
    return MixerOutput(y_BTD, y_BTD, y_BTD, state and _state(difference))


def _by_token(x: jax.Array) -> jax.Array:
  """Moves axis T of [B, H, T, K] or [B, T] to the front."""
  return jnp.moveaxis(x, 2 if x.ndim == 4 else 1, 0)


def _step(initial: jax.Array, dim: int) -> Tree:
  """(D, (phi(x) [B, H, K], whether a document begins [B])) -> (D, y)."""

  def step(d_BHRK: jax.Array, token: Tree) -> tuple[jax.Array, jax.Array]:
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


def describe(config: ModelConfig) -> list[Problem]:
  """See `models/interface.py`."""
  del config
  problem = Problem(
    name="memory",
    frequency=Fraction(1),
    context="(k, q) = W phi(n), its own, of the last token",
    objective="1/2 ‖W phi(k) - W phi(q)‖²",
    rule="GD, four steps sigmoid(b), its own, one per part of W; momentum:"
    " none; retention: none; read: token_pre",
    transfer=f"{META_LEARNED}; makes its own keys, targets and rates"
    " (self-modifying)",
  )
  return [problem]
