"""Mamba (2312.00752): a selective state space for every channel.

  v = SiLU(conv(n W_v)),  k = v W_k,  q = v W_q,  s = softplus(v W_1 W_2 + a)
  h_t = exp(-s_t A) h_{t-1} + s_t v_t k_t^T    `pallas_kernels/selective_scan`
  y = ((h q + D v) * silu(n W_z)) W_o

In the paper's symbols q, k, v, s are C, B, x, dt.  Each of the E = 2 D channels
has a state of 16 numbers, whose decay rates A start at 1 .. 16 (S4D-real).  Its
step s is made through a rank R = D / 16 and starts log-uniform in 0.001 .. 0.1;
W_2 starts uniform in +-1 / sqrt(R).  The published model has no FFNs.

Legend: B batch, T tokens, D model, E channels, K state of a channel, R rank.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from hope_jax.config import ModelConfig
from hope_jax.memory import devices
from hope_jax.models import layers, problems
from hope_jax.models.interface import FastState, MixerOutput, Problem, owned
from hope_jax.models.parameters import boxed, parameter
from pallas_kernels.selective_scan import ScanOutput, selective_scan

KEY_DIM = 16


class Tokens(NamedTuple):
  """v and s [B, T, E], k and q [B, T, K]; which tokens begin a document [B, T],
  None with a single document."""

  values: jax.Array
  step: jax.Array
  keys: jax.Array
  queries: jax.Array
  reset: jax.Array | None


def _widths(config: ModelConfig) -> dict[str, int]:
  """E, the width of the convolution."""
  return {"value": 2 * config.width}


@flax.struct.dataclass
class MambaState(FastState):
  """h [B, E, K], and the last inputs of the convolution."""

  memory: jax.Array = owned("memory")
  conv: dict[str, jax.Array] = owned("projections")


def init_state(
  config: ModelConfig, batch_size: int, read_size: int | None = None
) -> MambaState:
  """h = 0, no token read."""
  del read_size
  widths = _widths(config)
  return MambaState(
    jnp.zeros((batch_size, widths["value"], KEY_DIM), jnp.float32),
    layers.init_conv_state(config, batch_size, widths),
  )


def _log_decay_rate(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """log A: A is 1 .. K in every channel."""
  del key
  return jnp.broadcast_to(jnp.log(jnp.arange(1.0, 1.0 + shape[1])), shape)


class Gates(nn.Module):
  """s [B, T, E] and A [E, K], in float32."""

  config: ModelConfig

  @nn.compact
  def __call__(self, v_BTE: jax.Array) -> tuple[jax.Array, jax.Array]:
    cfg, width = self.config, v_BTE.shape[-1]
    rank = -(-cfg.width // 16)
    low_BTR = layers.dense(
      rank,
      cfg,
      ("heads", "rank"),
      "step_low",
      role="gate",
      owner=("memory",),
    )(v_BTE)
    step_BTE = nn.Dense(
      width,
      use_bias=False,
      dtype=jnp.dtype(cfg.dtype),
      kernel_init=boxed(
        layers.uniform(1 / 3), ("rank", "heads"), "gate", ("memory",)
      ),
      name="step",
    )(low_BTR)
    gate = functools.partial(parameter, self, role="gate", owner=("memory",))
    bias = gate("step_bias", layers.step_bias, (width,), ("heads",))
    rate = gate(
      "log_decay_rate",
      _log_decay_rate,
      (width, KEY_DIM),
      ("heads", "state"),
    )
    step_BTE = nn.softplus(step_BTE.astype(jnp.float32) + bias[None, None])
    return step_BTE, jnp.exp(rate)


def run_scan(
  tokens: Tokens, rate_EK: jax.Array, state: jax.Array, config: ModelConfig
) -> ScanOutput:
  """`selective_scan` from `state` [B, E, K]; devices run their own channels."""

  def run(values, step, keys, queries, reset, rate, state):
    found = selective_scan(
      values,
      step,
      keys=keys,
      queries=queries,
      decay_rate=rate,
      state=state,
      reset=reset,
      chunk_length=config.memory.chunk_length,
      checkpoint=config.memory.remat,
    )
    return tuple(found)

  axes = "BTH", "BTH", "B", "B", "B", "H", "BH"
  run = devices.by_heads(run, axes, ("BTH", "BH"))
  with jax.named_scope("recurrence"):
    return ScanOutput(*run(*tokens, rate_EK, state))


class ReadOut(nn.Module):
  """((o + D v) * silu(n W_z)) W_o."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, o_BTE: jax.Array, v_BTE: jax.Array
  ) -> jax.Array:
    cfg, width = self.config, o_BTE.shape[-1]
    ones = nn.initializers.ones
    skip = parameter(self, "norm_skip", ones, (width,), ("heads",))
    y_BTE = o_BTE + skip[None, None] * v_BTE
    gate = layers.dense(width, cfg, ("embed", "heads"), "gate")(x_BTD)
    y_BTE = y_BTE * nn.silu(gate).astype(y_BTE.dtype)
    return layers.dense(
      cfg.width, cfg, ("heads", "embed"), "output", is_output=True
    )(y_BTE)


class Mamba(nn.Module):
  """The sequence layer of Mamba, and of every other block of Samba."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: MambaState | None = None,
    documents: jax.Array | None = None,
  ) -> MixerOutput:
    cfg = self.config
    before = state or init_state(cfg, x_BTD.shape[0])
    projected, conv = layers.projections(
      x_BTD, _widths(cfg), cfg, before.conv, documents, use_bias=True
    )
    v_BTE = nn.silu(projected["value"])
    k_BTK, q_BTK = (
      layers.dense(KEY_DIM, cfg, ("heads", "state"), name)(v_BTE)
      for name in ("key", "query")
    )
    step_BTE, rate_EK = Gates(cfg, name="gates")(v_BTE)
    reset = None if documents is None else layers.document_starts(documents)
    o_BTE, memory = run_scan(
      Tokens(v_BTE, step_BTE, k_BTK, q_BTK, reset), rate_EK, before.memory, cfg
    )
    y_BTD = ReadOut(cfg, name="readout")(x_BTD, o_BTE, v_BTE)
    if state is not None:
      state = MambaState(memory, conv)
    return MixerOutput(y_BTD, k_BTK, v_BTE, state)


def describe(config: ModelConfig) -> list[Problem]:
  """See `models/interface.py`."""
  del config
  rule = "GD, step dt per channel, decay exp(-dt A) per number"
  return [problems.linear(problems.DOT, rule)]
