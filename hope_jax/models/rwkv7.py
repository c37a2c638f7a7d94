"""RWKV-7: a matrix memory with decays and learning rates per channel.

Time mix, with x^_z = lerp(n_t, n_{t-1}, mu_z) (token shift) for each of r, w,
k, v, a, g, and lora(x) = base + f(x A) B:

  r, k, v = x^_r W_r, x^_k W_k, x^_v W_v
  v = lerp(v, v of layer 0, sigmoid(lora(x^_v)))    in all layers but the first
  log w = -e^{-1/2} sigmoid(lora_tanh(x^_w)),  a = sigmoid(lora(x^_a))
  kappa = l2norm_head(k * xi),  k~ = k (1 + (a - 1) alpha_k)
  S_t = S_{t-1} (diag(w_t) - kappa_t (a_t kappa_t)^T) + v_t k~_t^T
  y_t = W_o (g_t * (groupnorm_head(S_t r_t) + (sum r_t rho k~_t) v_t)),
        g = sigmoid(x^_g A) B

Channel mix, in the FFN's place: W_v relu(W_k x^)^2.  Norms are LayerNorms, and
one more follows the embedding.  Heads have 64 channels; r is not scaled.

Source: 2503.14456 and its authors' code (BlinkDL/RWKV-LM, x070), from which the
ranks of the low-rank maps and all initial values are taken: mu, the decay's
base and the group norm's scale depend on the layer; W_o, the channel mix's W_v
and all A start at zero.  Deviations: the embedding is the one of all models
here (N(0, 0.02), tied by default); the first layer has the parameters of
lerp(v, ...), too, but does not use them, since layers are stacked; and the
decay's base has no doubled learning rate.

Legend: B batch, T tokens, D model, H heads, K head dim, F hidden.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree
from flax.typing import Initializer

from hope_jax.config import ModelConfig
from hope_jax.memory import chunks
from hope_jax.memory.norms import l2_normalize
from hope_jax.models import layers, problems
from hope_jax.models.block import Block
from hope_jax.models.fast_state import BlockState
from hope_jax.models.interface import FastState, MixerOutput, Problem, owned
from hope_jax.models.parameters import boxed, parameter
from hope_jax.optim.roles import Role
from pallas_kernels import generalized_delta_rule as rule

HEAD_DIM = 64
SHIFTED = ("receptance", "decay", "key", "value", "rate", "gate")
# mu = 1 - (i / D)^(p (1 - l / L)) - q l / (L - 1) in channel i of layer l, with
# p from SHIFT_POWERS, q from SHIFT_SLOPES (0 if absent).
SHIFT_POWERS = dict(zip(SHIFTED, (0.2, 0.9, 0.9, 0.4, 0.9, 0.2), strict=True))
SHIFT_SLOPES = {"key": 0.4, "value": 0.6}


class Depth(NamedTuple):
  """What a layer needs from the layers before it: their number, int32, and the
  first layer's values v [B, T, D]."""

  layer: jax.Array
  first_values: jax.Array

  def after(self, values: jax.Array) -> "Depth":
    """The `Depth` of the layer that follows one with these values."""
    return Depth(self.layer + 1, self.first(values))

  def first(self, values: jax.Array) -> jax.Array:
    """The first layer's values, given the current layer's `values`."""
    return jnp.where(self.layer == 0, values, self.first_values)


def first_depth(x_BTD: jax.Array) -> Depth:
  return Depth(jnp.zeros((), jnp.int32), jnp.zeros_like(x_BTD))


def num_heads(config: ModelConfig) -> int:
  """Number of heads of 64 channels; a narrower model has one."""
  return max(1, config.width // HEAD_DIM)


@flax.struct.dataclass
class RWKV7State(FastState):
  """S [B, H, K, K], and the last token that the time mix read [B, D]."""

  memory: chunks.Fast = owned("memory")
  shift: jax.Array = owned("projections")


def init_state(
  config: ModelConfig, batch_size: int, read_size: int | None = None
) -> RWKV7State:
  """S = 0; the token before the first is 0."""
  del read_size
  heads = num_heads(config)
  dim = config.width // heads
  zero = jnp.zeros((batch_size, heads, dim, dim), jnp.float32)
  return RWKV7State(chunks.Fast(zero), init_shift(config, batch_size))


def init_shift(config: ModelConfig, batch_size: int) -> jax.Array:
  """The token before the first, [B, D]."""
  return jnp.zeros((batch_size, config.width), jnp.dtype(config.dtype))


def token_shift(
  x_BTD: jax.Array, last_BD: jax.Array | None, documents: jax.Array | None
) -> jax.Array:
  """The token before each: `last_BD` for the first, 0 if a document begins."""
  if last_BD is None:
    last_BD = jnp.zeros_like(x_BTD[:, 0])
  before = jnp.concatenate([last_BD[:, None].astype(x_BTD.dtype), x_BTD], 1)
  before = before[:, :-1]
  if documents is None:
    return before
  return jnp.where(layers.document_starts(documents)[..., None], 0, before)


def lerp(x: jax.Array, y: jax.Array, share: jax.Array) -> jax.Array:
  """x + (y - x) share, in x's dtype."""
  return x + (y - x) * share.astype(x.dtype)


def _uniform(bound: float) -> Initializer:
  return lambda key, shape, dtype: jax.random.uniform(
    key, shape, dtype, -bound, bound
  )


def _relative(layer: jax.Array, config: ModelConfig) -> tuple[Tree, Tree]:
  """1 - l / L and l / (L - 1)."""
  down = 1.0 - layer / config.num_layers
  return down, layer / max(1, config.num_layers - 1)


class _Layer(nn.Module):
  """A module with learned vectors of one number per channel."""

  config: ModelConfig
  role: Role = "weight"
  owner: tuple[str, ...] = ()

  def channels(
    self, name: str, init: Callable[[jax.Array], Tree], axis: str = "heads"
  ) -> Tree:
    """A parameter [1, 1, D]; it starts at `init(i / D)` in channel i."""
    width = self.config.width
    start = lambda key, shape: jnp.broadcast_to(
      jnp.asarray(init(jnp.arange(width) / width), jnp.float32), shape
    )
    value = parameter(
      self, name, start, (width,), (axis,), role=self.role, owner=self.owner
    )
    return value[None, None]


class Projections(_Layer):
  """The token-shifted inputs of all maps by name, and r, k, v [B, T, D]."""

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, before_BTD: jax.Array, layer: jax.Array
  ) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    cfg = self.config
    down, up = _relative(layer, cfg)
    shifted = {}
    for name in SHIFTED:
      power, slope = SHIFT_POWERS[name] * down, SHIFT_SLOPES.get(name, 0) * up
      start = lambda i, power=power, slope=slope: 1 - i**power - slope
      mix = self.channels(f"shift_{name}", start, "embed")
      shifted[name] = lerp(x_BTD, before_BTD, mix)

    def project(name: str, bound: float) -> jax.Array:
      init = _uniform(bound * cfg.width**-0.5)
      dense = layers.dense(
        cfg.width, cfg, ("embed", "heads"), name, kernel_init=init
      )
      return dense(shifted[name])

    r, k, v = (
      project(name, bound)
      for name, bound in (("receptance", 0.5), ("key", 0.05), ("value", 0.5))
    )
    return shifted, (r, k, v)


class Gates(_Layer):
  """log w, a, the share of layer 0's v and g, [B, T, D]; xi and alpha_k."""

  @nn.compact
  def __call__(
    self, shifted: dict[str, jax.Array], layer: jax.Array
  ) -> dict[str, jax.Array]:
    cfg = self.config
    root = cfg.width**0.5
    _, up = _relative(layer, cfg)
    last = (cfg.width - 1) / cfg.width

    def decay(i):
      return -6.5 + 5 * (i / last) ** (0.85 + jnp.sqrt(up))

    sigmoid, same = nn.sigmoid, lambda x: x
    low = self._low_rank("decay", 1.8 * root, jnp.tanh, shifted["decay"])
    log_decay = self.channels("decay_base", decay) + low
    rate = self._low_rank("rate", 1.8 * root, same, shifted["rate"])
    share = self._low_rank("share", 1.3 * root, same, shifted["value"])
    gate = self._low_rank("gate", 0.6 * root**1.6, sigmoid, shifted["gate"])
    return {
      "log_decay": -jnp.exp(-0.5) * sigmoid(log_decay),
      "rate": sigmoid(self.channels("rate_base", lambda i: 0.0) + rate),
      "share": sigmoid(self.channels("share_base", lambda i: 1.0) + share),
      "gate": gate,
      "key_scale": self.channels("key_scale", lambda i: 0.85),
      "key_rate": self.channels("key_rate", lambda i: 1.0),
    }

  def _low_rank(
    self, name: str, rank: float, f: Any, x_BTD: jax.Array
  ) -> jax.Array:
    """f(x A) B in float32; the rank is rounded to a multiple of 32."""
    cfg = self.config
    rank = max(32, round(rank / 32) * 32)
    # The authors' gain for matrices with more rows than columns.
    scale = 0.1 * max(1.0, rank / cfg.width) ** 0.5
    for part, width, axes, init in (
      ("down", rank, ("embed", None), nn.initializers.zeros),
      ("up", cfg.width, (None, "heads"), nn.initializers.orthogonal(scale)),
    ):
      x_BTD = layers.dense(
        width,
        cfg,
        axes,
        f"{name}_{part}",
        kernel_init=init,
        role=self.role,
        owner=self.owner,
      )(x_BTD)
      x_BTD = f(x_BTD) if part == "down" else x_BTD
    return x_BTD.astype(jnp.float32)


class ReadOut(_Layer):
  """W_o (g * (groupnorm_head(o) + (sum r rho k~) v)); o, r, k~, v by head."""

  @nn.compact
  def __call__(self, o, rkv, gate_BTD, layer):
    cfg, (r, k, v) = self.config, rkv
    by_head = lambda x: x.reshape(1, o.shape[1], 1, o.shape[3])
    o = o - jnp.mean(o, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(o), axis=-1, keepdims=True)
    o = o * jax.lax.rsqrt(variance + 1e-5 * o.shape[-1])
    share = (layer + 1) / cfg.num_layers
    scale = self.channels("norm_scale", lambda i: share**0.7)
    bias = self.channels("norm_bias", lambda i: 0.0)
    bonus = self.channels("bonus", lambda i: 0.0)
    o = o * by_head(scale) + by_head(bias)
    o = o + jnp.sum(r * k * by_head(bonus), axis=-1, keepdims=True) * v
    y_BTD = layers.merge_heads(o) * gate_BTD
    return layers.dense(
      cfg.width,
      cfg,
      ("heads", "embed"),
      "output",
      kernel_init=nn.initializers.zeros,
    )(y_BTD)


class TimeMix(nn.Module):
  """The sequence layer, which also needs its `Depth`."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: RWKV7State | None,
    documents: jax.Array | None,
    depth: Depth,
  ) -> MixerOutput:
    cfg, heads = self.config, num_heads(self.config)
    layer = depth.layer.astype(jnp.float32)
    start = state or init_state(cfg, x_BTD.shape[0])
    before_BTD = token_shift(x_BTD, start.shift, documents)
    shifted, (r, k, v) = Projections(cfg, name="projections")(
      x_BTD, before_BTD, layer
    )
    gates = Gates(cfg, "gate", ("memory",), name="gates")(shifted, layer)
    v = lerp(v, depth.first(v), gates["share"])
    split = lambda x: layers.split_heads(x, heads)
    kappa = l2_normalize(split(k * gates["key_scale"]))
    k = k * (1 + (gates["rate"] - 1) * gates["key_rate"])
    rkv = split(r), split(k), split(v)
    reset = None
    if documents is not None:
      reset = layers.document_starts(documents)[:, None].repeat(heads, 1)
    with jax.named_scope("recurrence"):
      out = rule.generalized_delta_rule(
        rkv[1],
        rkv[2],
        queries=rkv[0],
        log_decay=split(gates["log_decay"]),
        erase_read=-kappa,
        erase_write=kappa * split(gates["rate"]),
        weight=start.memory.weight,
        reset=reset,
        chunk_length=min(cfg.memory.chunk_length, rule.MAX_CHUNK_LENGTH),
        checkpoint=cfg.memory.remat,
      )
    y_BTD = ReadOut(cfg, name="readout")(out.outputs, rkv, gates["gate"], layer)
    if state is not None:
      state = RWKV7State(chunks.Fast(out.weight), x_BTD[:, -1])
    return MixerOutput(y_BTD, k, v, state)


class ChannelMix(_Layer):
  """W_v relu(W_k lerp(x_t, x_{t-1}, mu))^2; also returns the last token."""

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    last_BD: jax.Array | None,
    documents: jax.Array | None,
    layer: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    cfg = self.config
    down, _ = _relative(layer.astype(jnp.float32), cfg)
    mix = self.channels("shift_key", lambda i: 1 - i ** (down**4), "embed")
    before_BTD = token_shift(x_BTD, last_BD, documents)
    mixed = lerp(x_BTD, before_BTD, mix)
    init = _uniform(0.5 * cfg.width**-0.5)
    hidden = layers.dense(
      cfg.ffn_hidden, cfg, ("embed", "mlp"), "key", kernel_init=init
    )(mixed)
    hidden = nn.with_logical_constraint(hidden, ("batch", "length", "mlp"))
    y_BTD = layers.dense(
      cfg.width,
      cfg,
      ("mlp", "embed"),
      "value",
      kernel_init=nn.initializers.zeros,
    )(jnp.square(nn.relu(hidden)))
    return y_BTD, x_BTD[:, -1]


class RWKV7Block(Block):
  """The block with LayerNorms, a channel mix in the FFN's place, and a `Depth`
  that accompanies the residual stream: (x, depth) -> (x, depth)."""

  @nn.compact
  def __call__(
    self,
    stream: tuple[jax.Array, Depth],
    state: BlockState | None,
    documents: jax.Array | None,
  ) -> tuple[tuple[jax.Array, Depth], BlockState | None]:
    cfg, (x_BTD, depth) = self.config, stream
    normed = _layer_norm(cfg, "norm_mixer")(x_BTD)
    mixed = TimeMix(cfg, name="mixer")(
      normed, state.mixer if state else None, documents, depth
    )
    x_BTD = x_BTD + mixed.y
    last_BD = state.ffn if state else None
    if cfg.ffn_hidden:
      normed = _layer_norm(cfg, "norm_ffn")(x_BTD)
      y_BTD, last_BD = ChannelMix(cfg, name="ffn")(
        normed, last_BD, documents, depth.layer
      )
      x_BTD = x_BTD + y_BTD
    if state is not None:
      state = dataclasses.replace(state, mixer=mixed.state, ffn=last_BD)
    return (layers.residual(x_BTD), depth.after(mixed.values)), state


def _layer_norm(config: ModelConfig, name: str) -> nn.LayerNorm:
  """(x - mean) / std * scale + bias, in float32."""
  return nn.LayerNorm(
    dtype=jnp.dtype(config.dtype),
    epsilon=1e-5,
    scale_init=boxed(nn.initializers.ones, ("norm",), "norm"),
    bias_init=boxed(nn.initializers.zeros, ("norm",), "norm"),
    name=name,
  )


def begin(config: ModelConfig, x_BTD: jax.Array) -> tuple[jax.Array, Depth]:
  """The input of the first block, from the embeddings."""
  x_BTD = _layer_norm(config, "norm_in")(x_BTD)
  return x_BTD, first_depth(x_BTD)


def end(config: ModelConfig, stream: tuple[jax.Array, Depth]) -> jax.Array:
  """The input of the map to the logits."""
  return _layer_norm(config, "norm_out")(stream[0])


def describe(config: ModelConfig) -> list[Problem]:
  """See `models/interface.py`."""
  del config
  rule = "GD, step a, decay w, both per channel; erases along kappa"
  return [problems.linear(problems.L2, rule)]
