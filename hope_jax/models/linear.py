"""Linear baselines: one matrix memory per head, read after each write.

  S_t = S_{t-1} (alpha_t I - delta_t k_t k_t^T) + eta_t v_t k_t^T
  y_t = W_o (norm(S_t q_t) * gate(n_t))

  name            alpha         eta  delta    q and k    gate
  retnet          1 - 2^(-5-h)  1    -        rotary     swish
  deltanet        1             b    b        conv, l2   none
  gated_deltanet  exp(-e^A s)   b    alpha b  conv, l2   swish
  comba           exp(-e^A s)   b    c b      conv, l2   sigmoid

with b = sigmoid(n w_b), s = softplus(n w_s + a), and A, a, c, d learned per
head; "conv" is SiLU of a causal convolution, of v, too.  Queries are scaled by
K^-1/2; Comba first corrects them, q <- l2norm(q - d c k).  `VARIANTS` is this
table; Mamba2 uses the same rule (`models/mamba2.py`).

Sources: RetNet 2307.08621, DeltaNet 2406.06484, Gated DeltaNet 2412.06464,
Comba 2506.02475.  Layouts are as published: values are twice as wide as keys in
RetNet, Gated DeltaNet and Comba, and the last two have 3/4 of the heads.

Initial values are those of the authors' code: e^A uniform in 0 .. 16 in Gated
DeltaNet and Comba; softplus(a) log-uniform in 0.001 .. 0.1; c = sigmoid(1); d =
0.02, or 1 from a width of 2048 on (Comba at 340M and 1.3B).  RetNet's and
DeltaNet's maps start Xavier-uniform with gain 2^-5/2, except W_o, with gain 1
in RetNet and 2^-5/2 / sqrt(2 L) in DeltaNet.  The other models' maps, and all
FFNs, start as the config's `initializer` says.

All are special cases of `pallas_kernels.linear_rule`, which is exact for any
chunk length.

Legend: B batch, T tokens, D model, H heads, K head dim, E value dim of a head.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree
from flax.typing import Initializer

from hope_jax.config import ModelConfig
from hope_jax.memory import devices
from hope_jax.memory.norms import l2_normalize, rms_normalize
from hope_jax.models import layers, problems, rotary
from hope_jax.models.interface import FastState, MixerOutput, Problem, owned
from hope_jax.models.parameters import parameter
from pallas_kernels.linear_rule import linear_rule


class Layout(NamedTuple):
  """Heads, key dim K and value dim E of a head."""

  heads: int
  key_dim: int
  value_dim: int


class Rule(NamedTuple):
  """alpha, eta and delta (None: no erase) of the rule, [B, H, T]; the multiple
  of the key that is subtracted from the query, [1, H, 1], or None."""

  retention: jax.Array
  learn_rate: jax.Array
  erase: jax.Array | None
  correction: jax.Array | None = None


class GateInputs(NamedTuple):
  """The building blocks of a variant's gates.

  Attributes:
    ones: [B, H, T].
    per_token: name -> a linear map of the layer's input, [B, H, T].
    per_head: (name, initializer) -> a learned number per head, [1, H, 1].
    config: the model's config.
  """

  ones: jax.Array
  per_token: Callable[[str], jax.Array]
  per_head: Callable[[str, Tree], jax.Array]
  config: ModelConfig


class Variant(NamedTuple):
  """A row of the module's table.

  Attributes:
    layout: (heads, head width) -> the published layout.
    rule: the gates of a token.
    problem: its objective and rule in words.
    gate: the activation of the output's gate; None: there is no gate.
    is_rotary: whether q and k have rotary positions in place of an L2 norm.
    is_centered: whether the output's norm is a group norm (RMS otherwise).
    gain: L blocks -> the gains of the maps' Xavier-uniform start: of all but
      W_o, and of W_o; None: the config's `initializer`.
  """

  layout: Callable[[int, int], Layout]
  rule: Callable[[GateInputs], Rule]
  problem: tuple[str, str]
  gate: Callable[[jax.Array], jax.Array] | None = None
  is_rotary: bool = False
  is_centered: bool = False
  gain: Callable[[int], tuple[float, float]] | None = None


def log_decay_rate(lowest: float) -> Initializer:
  """Initial A: log of uniform(lowest, 16), with `lowest` at least 1e-4."""
  low = max(lowest, 1e-4)
  return lambda key, shape: jnp.log(
    jax.random.uniform(key, shape, minval=low, maxval=16.0)
  )


def _constant(value: float) -> Initializer:
  return lambda key, shape: jnp.full(shape, value, jnp.float32)


def decay(gates: GateInputs, lowest: float) -> tuple[jax.Array, jax.Array]:
  """exp(-e^A s) and s, where A starts from `log_decay_rate(lowest)`."""
  speed = jnp.exp(gates.per_head("log_decay_rate", log_decay_rate(lowest)))
  step = gates.per_token("step")
  step = nn.softplus(step + gates.per_head("step_bias", layers.step_bias))
  return jnp.exp(-speed * step), step


def _retnet(gates: GateInputs) -> Rule:
  gamma_H = 1.0 - 2.0 ** (-5.0 - jnp.arange(gates.ones.shape[1]))
  return Rule(gates.ones * gamma_H[None, :, None], gates.ones, None)


def _deltanet(gates: GateInputs) -> Rule:
  rate = nn.sigmoid(gates.per_token("rate"))
  return Rule(gates.ones, rate, rate)


def _gated_deltanet(gates: GateInputs) -> Rule:
  alpha, _ = decay(gates, 0.0)
  rate = nn.sigmoid(gates.per_token("rate"))
  return Rule(alpha, rate, alpha * rate)


def _comba(gates: GateInputs) -> Rule:
  alpha, _ = decay(gates, 0.0)
  rate = nn.sigmoid(gates.per_token("rate"))
  feedback = nn.sigmoid(gates.per_head("feedback", _constant(1.0)))
  correction = 0.02 if gates.config.width < 2048 else 1.0
  correction = gates.per_head("correction", _constant(correction))
  return Rule(alpha, rate, feedback * rate, correction * feedback)


def _fewer_heads(heads: int, dim: int) -> Layout:
  return Layout(max(1, 3 * heads // 4), dim, 2 * dim)


VARIANTS = {
  "retnet": Variant(
    lambda heads, dim: Layout(heads, dim, 2 * dim),
    _retnet,
    (problems.DOT, "GD, step 1, decay per head"),
    nn.silu,
    is_rotary=True,
    is_centered=True,
    gain=lambda blocks: (2**-2.5, 1.0),
  ),
  "deltanet": Variant(
    lambda heads, dim: Layout(heads, dim, dim),
    _deltanet,
    (problems.L2, "GD, step b"),
    gain=lambda blocks: (2**-2.5, 2**-2.5 / (2 * blocks) ** 0.5),
  ),
  "gated_deltanet": Variant(
    _fewer_heads,
    _gated_deltanet,
    (problems.L2, "GD, step b, on the decayed state"),
    nn.silu,
  ),
  "comba": Variant(
    _fewer_heads,
    _comba,
    (problems.L2, "GD, step b, decay; erases c b"),
    nn.sigmoid,
  ),
}


def _variant(config: ModelConfig) -> Variant:
  return VARIANTS[config.sequence_layer]


def layout(config: ModelConfig) -> Layout:
  """The published layout at the config's width and heads."""
  return _variant(config).layout(config.num_heads, config.head_dim)


def _widths(config: ModelConfig) -> dict[str, int]:
  """Width H K or H E of each projection."""
  shape = layout(config)
  keys = shape.heads * shape.key_dim
  values = shape.heads * shape.value_dim
  return {"query": keys, "key": keys, "value": values}


@flax.struct.dataclass
class Matrix:
  """S [B, H, E, K], and the number of tokens read so far."""

  weight: jax.Array
  position: jax.Array


@flax.struct.dataclass
class LinearState(FastState):
  """The memory, and the last inputs of the convolutions."""

  memory: Matrix = owned("memory")
  conv: dict[str, jax.Array] = owned("projections")


def zero_state(
  config: ModelConfig, batch_size: int, shape: Layout, widths: dict[str, int]
) -> LinearState:
  """S = 0, no token read."""
  matrix = batch_size, shape.heads, shape.value_dim, shape.key_dim
  return LinearState(
    Matrix(jnp.zeros(matrix, jnp.float32), jnp.zeros((), jnp.int32)),
    layers.init_conv_state(config, batch_size, widths),
  )


def init_state(
  config: ModelConfig, batch_size: int, read_size: int | None = None
) -> LinearState:
  """S = 0, no token read."""
  del read_size
  return zero_state(config, batch_size, layout(config), _widths(config))


def _kernel_init(
  config: ModelConfig, *, is_output: bool = False
) -> Initializer | None:
  """The published initializer of the maps; None: the config's."""
  gain = _variant(config).gain
  if gain is None:
    return None
  return layers.uniform(gain(config.num_layers)[is_output] ** 2, "fan_avg")


class Gates(nn.Module):
  """A `Rule` from the layer's input: scalars per token and head.

  Attributes:
    rule: as in `Variant`.
    heads: H.
    kernel_init: the maps' initializer; None: the config's.
  """

  config: ModelConfig
  rule: Callable[[GateInputs], Rule]
  heads: int
  kernel_init: Initializer | None = None

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> Rule:
    shape = x_BTD.shape[0], self.heads, x_BTD.shape[1]
    ones = jnp.ones(shape, jnp.float32)
    per_token = functools.partial(self._per_token, x_BTD)
    return self.rule(GateInputs(ones, per_token, self._per_head, self.config))

  def _per_token(self, x_BTD: jax.Array, name: str) -> jax.Array:
    dense = layers.dense(
      self.heads,
      self.config,
      ("embed", "heads"),
      name,
      kernel_init=self.kernel_init,
      role="gate",
      owner=("memory",),
    )
    return dense(x_BTD).swapaxes(1, 2).astype(jnp.float32)

  def _per_head(self, name: str, init: Initializer) -> jax.Array:
    value = parameter(
      self,
      name,
      init,
      (self.heads,),
      ("heads",),
      role="gate",
      owner=("memory",),
    )
    return value[None, :, None]


class LinearMemory(nn.Module):
  """The sequence layer of all models in the module's table."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: LinearState | None = None,
    documents: jax.Array | None = None,
  ) -> MixerOutput:
    cfg, variant = self.config, _variant(self.config)
    shape = layout(cfg)
    before = state or init_state(cfg, x_BTD.shape[0])
    projected, conv = layers.projections(
      x_BTD,
      _widths(cfg),
      cfg,
      before.conv,
      documents,
      kernel_init=_kernel_init(cfg),
    )
    if cfg.conv_window:
      projected = {name: nn.silu(p) for name, p in projected.items()}
    rule = Gates(
      cfg, variant.rule, shape.heads, _kernel_init(cfg), name="gates"
    )(x_BTD)
    q, k, v = (
      layers.split_heads(projected[name], shape.heads)
      for name in ("query", "key", "value")
    )
    if variant.is_rotary:
      position = before.memory.position + jnp.arange(x_BTD.shape[1])
      turn = lambda x: rotary.rotate(
        x.swapaxes(1, 2), position, cfg.rope_base
      ).swapaxes(1, 2)
      q, k = turn(q), turn(k)
    else:
      q, k = l2_normalize(q), l2_normalize(k)
    if rule.correction is not None:
      q = l2_normalize(q - rule.correction[..., None] * k)
    tokens = Tokens(k, v, q * shape.key_dim**-0.5, rule)
    o, after = run_rule(tokens, before.memory, documents, cfg)
    if state is not None:
      state = LinearState(after, conv)
    y_BTD = ReadOut(cfg, name="readout")(x_BTD, o)
    return MixerOutput(y_BTD, projected["key"], projected["value"], state)


class Tokens(NamedTuple):
  """Keys, queries [B, H, T, K], values [B, H, T, E] and their rule."""

  keys: jax.Array
  values: jax.Array
  queries: jax.Array
  rule: Rule


def run_rule(
  tokens: Tokens,
  before: Matrix,
  documents: jax.Array | None,
  config: ModelConfig,
) -> tuple[jax.Array, Matrix]:
  """(o [B, H, T, E], the memory after) by `linear_rule`, which every device
  runs for its own heads."""
  name = config.memory.implementation
  heads, length = tokens.keys.shape[1:3]
  reset = None
  if documents is not None:
    reset = layers.document_starts(documents)[:, None].repeat(heads, 1)

  def run(tokens, weight, reset):
    return linear_rule(
      tokens.keys,
      -tokens.values,
      weight=weight,
      momentum=None,
      retention=tokens.rule.retention,
      momentum_decay=None,
      step_size=tokens.rule.learn_rate,
      erase=tokens.rule.erase,
      queries=tokens.queries,
      read="post",
      reset=reset,
      chunk_length=config.memory.chunk_length,
      implementation=None if name == "auto" else name,
      checkpoint=config.memory.remat,
    )

  run = devices.by_heads(run, ("BH",) * 3)
  rule = tokens.rule._replace(correction=None)
  with jax.named_scope("recurrence"):
    out = run(tokens._replace(rule=rule), before.weight, reset)
  assert out.outputs is not None
  return out.outputs, Matrix(out.weight, before.position + length)


class ReadOut(nn.Module):
  """W_o (norm(o) * gate(n))."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, o: jax.Array) -> jax.Array:
    cfg, variant = self.config, _variant(self.config)
    shape = layout(cfg)
    if variant.is_centered:
      o = o - jnp.mean(o, axis=-1, keepdims=True)
    scale = norm_scale(self, shape.value_dim)[None, None, None]
    y = layers.merge_heads(rms_normalize(o, cfg.norm_eps) * scale)
    if variant.gate is not None:
      gate = layers.dense(
        shape.heads * shape.value_dim,
        cfg,
        ("embed", "heads"),
        "gate",
        kernel_init=_kernel_init(cfg),
      )
      y = y * variant.gate(gate(x_BTD)).astype(y.dtype)
    return layers.dense(
      cfg.width,
      cfg,
      ("heads", "embed"),
      "output",
      is_output=True,
      kernel_init=_kernel_init(cfg, is_output=True),
    )(y)


def norm_scale(module: nn.Module, size: int) -> Tree:
  """The scale of a norm, a parameter of `module`."""
  ones = nn.initializers.ones
  return parameter(module, "norm_scale", ones, (size,), ("norm",), role="norm")


def describe(config: ModelConfig) -> list[Problem]:
  """See `models/interface.py`."""
  return [problems.linear(*_variant(config).problem)]
