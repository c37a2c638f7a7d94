"""Linear baselines: one matrix memory per head, read after it is written.

  S_t = S_{t-1} (alpha_t I - delta_t k_t k_t^T) + eta'_t v_t k_t^T
  y_t = W_o (norm(S_t q_t) * gate(n_t))

  name            alpha         eta' delta    q and k         gate
  retnet          1 - 2^(-5-h)  1    -        rotary          swish
  deltanet        1             b    b        conv, l2        none
  gated_deltanet  exp(-e^A s)   b    alpha b  conv, l2        swish
  comba           exp(-e^A s)   b    c b      conv, l2        sigmoid
  mamba2          exp(-e^A s)   s    -        conv, no heads  swish, then norm

with b = sigmoid(n w_b), s = softplus(n w_s + a), and A, a, c learned per head;
"conv": SiLU of a causal convolution, v too.  Queries carry K^-1/2, but for
Mamba2's; Comba's are corrected, q <- l2norm(q - d c k).  Mamba2 (SSD) calls q,
k, v, s C, B, x, dt and adds D x to what it reads, D learned per head.

Sources: RetNet 2307.08621, DeltaNet 2406.06484, Gated DeltaNet 2412.06464,
Comba 2506.02475, Mamba2 2405.21060.  Layouts as published: values twice as wide
as keys in RetNet, Gated DeltaNet and Comba, the last two with 3/4 of the heads;
Mamba2 has heads of 64, states of 128, twice the width, and no FFN.

Initial values are of the authors' code: A uniform in 1 .. 16 in Mamba2, in
0 .. 16 in Gated DeltaNet and Comba; softplus(a) log-uniform in 0.001 .. 0.1;
c = sigmoid(1); d = 0.02, from a width of 2048 on 1 (Comba at 340M and 1.3B).
RetNet's and DeltaNet's maps here begin Xavier-uniform with gain 2^-5/2, but W_o
with 1 in RetNet and divided by sqrt(2 L) in DeltaNet; those of the FFN, and all
of the others, as the config's `initializer` says.

All are choices of `pallas_kernels.linear_rule`, exact for any chunk length.

Legend: B batch, T tokens, D model, H heads, K head dim, E value dim of a head.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hope_jax.memory import devices
from hope_jax.memory.architectures import l2_normalize, rms_normalize
from hope_jax.model_config import ModelConfig
from hope_jax.models import attention, layers
from hope_jax.models.interface import MixerOutput
from pallas_kernels.linear_rule import linear_rule


class Layout(NamedTuple):
  """Heads, key dim K and value dim E of a head, what gates the output."""

  heads: int
  key_dim: int
  value_dim: int
  gate: str
  is_shared: bool = False  # one q and k for all heads


def layout(config: ModelConfig) -> Layout:
  """The published layout at the config's width and heads."""
  heads, dim = config.num_heads, config.head_dim
  fewer, small = max(1, 3 * heads // 4), max(1, 2 * config.width // 64)
  return {
    "retnet": Layout(heads, dim, 2 * dim, "swish"),
    "deltanet": Layout(heads, dim, dim, "none"),
    "gated_deltanet": Layout(fewer, dim, 2 * dim, "swish"),
    "comba": Layout(fewer, dim, 2 * dim, "sigmoid"),
    "mamba2": Layout(small, 128, 2 * config.width // small, "swish", True),
  }[config.sequence_layer]


def _widths(config: ModelConfig) -> dict[str, int]:
  """Width H K or H E of each projection."""
  shape = layout(config)
  keys = shape.key_dim * (1 if shape.is_shared else shape.heads)
  values = shape.heads * shape.value_dim
  return {"query": keys, "key": keys, "value": values}


def init_state(
  config: ModelConfig, batch_size: int, piece_length: int | None = None
) -> dict[str, Any]:
  """S = 0, no token read."""
  del piece_length
  shape = layout(config)
  matrix = batch_size, shape.heads, shape.value_dim, shape.key_dim
  return {
    "memory": {
      "weight": jnp.zeros(matrix, jnp.float32),
      "position": jnp.zeros((), jnp.int32),
    },
    "conv": layers.init_conv_state(config, batch_size, _widths(config)),
  }


def document_starts(segments: jax.Array) -> jax.Array:
  """Whether a token is the first of a document: numbers [B, T] -> bool.

  Document 0 is the one that a given state belongs to.
  """
  before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
  return segments != before


class Rule(NamedTuple):
  """alpha, eta' and delta (None: no erase) of the rule, [B, H, T]."""

  retention: jax.Array
  step_size: jax.Array
  erase: jax.Array | None


def _kernel_init(config: ModelConfig, *, is_output: bool = False) -> Any:
  """The start of RetNet's and DeltaNet's maps; None: the config's."""
  if config.sequence_layer not in ("retnet", "deltanet"):
    return None
  gain = 2**-2.5
  if is_output:
    is_retnet = config.sequence_layer == "retnet"
    gain = 1.0 if is_retnet else gain / (2 * config.num_layers) ** 0.5
  return layers.uniform(gain**2, "fan_avg")


def _dense(
  features: int, config: ModelConfig, name: str, *, is_output: bool = False
) -> nn.Dense:
  """A map from the model's width to the heads, or from them to it."""
  axes = ("heads", "embed") if is_output else ("embed", "heads")
  init = _kernel_init(config, is_output=is_output)
  return layers.dense(
    features, config, axes, name, is_output=is_output, kernel_init=init
  )


def _log_decay_rate(lowest: float) -> Any:
  """A: log of uniform(lowest, 16), where 0 means a little more."""
  low = max(lowest, 1e-4)
  return lambda key, shape: jnp.log(
    jax.random.uniform(key, shape, minval=low, maxval=16.0)
  )


def step_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """a of Mamba2: softplus(a) log-uniform in 0.001 .. 0.1."""
  low, high = jnp.log(1e-3), jnp.log(0.1)
  step = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
  return step + jnp.log(-jnp.expm1(-step))


class LinearGates(nn.Module):
  """The rule's scalars per token and head, and Comba's c and d per head."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> tuple[Rule, Any]:
    cfg, name = self.config, self.config.sequence_layer
    heads = layout(cfg).heads
    shape = x_BTD.shape[0], heads, x_BTD.shape[1]
    ones = jnp.ones(shape, jnp.float32)
    if name == "retnet":
      gamma_H = 1.0 - 2.0 ** (-5.0 - jnp.arange(heads))
      return Rule(ones * gamma_H[None, :, None], ones, None), None

    def per_token(name: str) -> jax.Array:
      dense = _dense(heads, cfg, name)
      return dense(x_BTD).swapaxes(1, 2).astype(jnp.float32)

    if name == "deltanet":
      rate = nn.sigmoid(per_token("rate"))
      return Rule(ones, rate, rate), None
    init = _log_decay_rate(1.0 if name == "mamba2" else 0.0)
    speed = jnp.exp(self._per_head("log_decay_rate", init))
    step = per_token("step") + self._per_head("step_bias", step_bias)
    step = nn.softplus(step)
    alpha = jnp.exp(-speed * step)
    if name == "mamba2":
      return Rule(alpha, step, None), None
    rate = nn.sigmoid(per_token("rate"))
    if name == "gated_deltanet":
      return Rule(alpha, rate, alpha * rate), None
    feedback = nn.sigmoid(self._per_head("feedback", _constant(1.0)))
    correction = 0.02 if cfg.width < 2048 else 1.0
    correction = self._per_head("correction", _constant(correction))
    return Rule(alpha, rate, feedback * rate), correction * feedback

  def _per_head(self, name: str, init: Any) -> jax.Array:
    """A learned number per head, [1, H, 1]."""
    box = nn.with_logical_partitioning(init, ("heads",))
    value: Any = self.param(name, box, (layout(self.config).heads,))
    return value[None, :, None]


def _constant(value: float) -> Any:
  return lambda key, shape: jnp.full(shape, value, jnp.float32)


class LinearMemory(nn.Module):
  """The sequence layer of all models in the module's table."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: dict[str, Any] | None = None,
    segments: jax.Array | None = None,
  ) -> MixerOutput:
    cfg = self.config
    shape, is_mamba = layout(cfg), cfg.sequence_layer == "mamba2"
    start = state or init_state(cfg, x_BTD.shape[0])
    before = start["memory"]
    projected, conv = layers.projections(
      x_BTD,
      _widths(cfg),
      cfg,
      start["conv"],
      segments,
      use_bias=is_mamba,
      kernel_init=_kernel_init(cfg),
    )
    if cfg.conv_window:
      projected = {name: nn.silu(p) for name, p in projected.items()}
    rule, correction = LinearGates(cfg, name="gates")(x_BTD)
    q, k = (
      self._heads(projected[name], is_shared=shape.is_shared)
      for name in ("query", "key")
    )
    v = self._heads(projected["value"])
    if cfg.sequence_layer == "retnet":
      position = before["position"] + jnp.arange(x_BTD.shape[1])
      q, k = (self._rotate(p, position) for p in (q, k))
    elif not is_mamba:
      q, k = l2_normalize(q), l2_normalize(k)
    if correction is not None:
      q = l2_normalize(q - correction[..., None] * k)
    reset = None
    if segments is not None:
      reset = document_starts(segments)[:, None].repeat(shape.heads, 1)
    out = run_rule(
      cfg,
      k,
      v,
      q if is_mamba else q * shape.key_dim**-0.5,
      rule,
      before["weight"],
      reset,
    )
    if state is not None:
      end = before["position"] + x_BTD.shape[1]
      memory = {"weight": out.weight, "position": end}
      state = {"memory": memory, "conv": conv}
    y_BTD = LinearReadOut(cfg, name="readout")(x_BTD, out.outputs, v)
    return MixerOutput(y_BTD, projected["key"], projected["value"], state)

  def _heads(self, p: jax.Array, *, is_shared: bool = False) -> jax.Array:
    """[B, T, H K], or [B, T, K] for all heads, -> [B, H, T, K] in float32."""
    heads = layout(self.config).heads
    if not is_shared:
      return layers.split_heads(p, heads)
    return layers.split_heads(p, 1).repeat(heads, 1)

  def _rotate(self, x: jax.Array, position: jax.Array) -> jax.Array:
    base = self.config.rope_base
    return attention.rotate(x.swapaxes(1, 2), position, base).swapaxes(1, 2)


def run_rule(
  config: ModelConfig,
  keys: jax.Array,
  values: jax.Array,
  queries: jax.Array,
  rule: Rule,
  weight: jax.Array,
  reset: jax.Array | None,
) -> Any:
  """`linear_rule` from state `weight` [B, H, E, K], on every device's heads."""
  name = config.memory.implementation
  implementation: Any = None if name == "auto" else name

  def run(keys, values, queries, rule, weight, reset):
    return linear_rule(
      keys,
      -values,
      weight=weight,
      momentum=None,
      retention=rule.retention,
      momentum_decay=None,
      step_size=rule.step_size,
      erase=rule.erase,
      queries=queries,
      read="post",
      reset=reset,
      chunk_length=config.memory.chunk_length,
      implementation=implementation,
      checkpoint=config.memory.remat,
    )

  run = devices.by_heads(run, ("BH",) * 6)
  with jax.named_scope("recurrence"):
    return run(keys, values, queries, rule, weight, reset)


class LinearReadOut(nn.Module):
  """W_o (norm(o) * gate(n)): RetNet's norm is a group norm, the others' RMS.

  Mamba2: W_o norm((o + D v) * gate(n)), the norm over all heads together.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, o: jax.Array, v: jax.Array) -> jax.Array:
    cfg, shape = self.config, layout(self.config)
    is_mamba = cfg.sequence_layer == "mamba2"
    width = shape.heads * shape.value_dim
    if is_mamba:
      init = nn.with_logical_partitioning(nn.initializers.ones, ("heads",))
      skip: Any = self.param("norm_skip", init, (shape.heads,))
      o = o + skip[None, :, None, None] * v
    else:
      if cfg.sequence_layer == "retnet":
        o = o - jnp.mean(o, axis=-1, keepdims=True)
      scale = self._scale(shape.value_dim)[None, None, None]
      o = rms_normalize(o, cfg.norm_eps) * scale
    y = layers.merge_heads(o)
    if shape.gate != "none":
      activate = {"swish": nn.silu, "sigmoid": nn.sigmoid}[shape.gate]
      dense = _dense(width, cfg, "gate")
      y = y * activate(dense(x_BTD)).astype(y.dtype)
    if is_mamba:
      y = rms_normalize(y, cfg.norm_eps) * self._scale(width)[None, None]
    return _dense(cfg.width, cfg, "output", is_output=True)(y)

  def _scale(self, size: int) -> Any:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    return self.param("norm_scale", init, (size,))
