"""TTT-Linear and TTT-MLP as sequence layers (2407.04620).

  c = conv(n_0),  n = RMS(x + c)                 n_0: x after the block's norm
  p = n W_qk;  q, k = rotary(conv_q(p)), rotary(conv_k(p));  v = n W_v
  eta = base_lr sigmoid(n w + b) / K             per head
  o = f(q_t; W_t)                                `memory/ttt.py`
  y = c + W_o (LN(o) * gelu(n W_g))              LN over the full width

The block adds y to x, so c is a residual convolution before the layer.  Without
convolutions (`conv_window` 0) c = 0 and n = n_0.  q and k share a projection,
have neither SiLU nor L2 norm, and are rotated by their position in the
mini-batch.  In the config `memory.chunk_length` is the mini-batch's length
(published: 16), `memory.initial_learn_rate` is base_lr (published: 1.0 linear,
0.1 MLP) and `memory.hidden` is the MLP's hidden width (published: 4 K).

Legend: B batch, T tokens, D model, H heads, K head dim, F memory hidden.
"""

import dataclasses
from collections.abc import Mapping
from fractions import Fraction

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree
from flax.typing import Initializer

from hope_jax.config import ModelConfig
from hope_jax.memory import chunks, ttt
from hope_jax.memory.architectures import Weights
from hope_jax.memory.norms import layer_normalize
from hope_jax.models import layers, rotary
from hope_jax.models.block import Block
from hope_jax.models.interface import (
  META_LEARNED,
  FastState,
  Level,
  MixerOutput,
  Problem,
  owned,
)
from hope_jax.models.parameters import boxed, parameter


def initial_shapes(config: ModelConfig) -> Weights:
  """Shapes of W_0 and b_0."""
  heads, dim = config.num_heads, config.head_dim
  if config.sequence_layer == "ttt_linear":
    return Weights(None, ttt.Layer((heads, dim, dim), (heads, dim)))
  hidden = config.memory.hidden or 4 * dim
  return Weights(
    ttt.Layer((heads, hidden, dim), (heads, hidden)),
    ttt.Layer((heads, dim, hidden), (heads, dim)),
  )


def _conv_widths(config: ModelConfig) -> dict[str, int]:
  return dict.fromkeys(("block", "query", "key"), config.width)


@flax.struct.dataclass
class TTTState(FastState):
  """The memory, and the last inputs of the convolutions."""

  memory: chunks.ChunkState = owned("memory")
  conv: dict[str, jax.Array] = owned("projections")

  def fast_levels(
    self, initial: Mapping[str, Tree], config: ModelConfig
  ) -> dict[str, Level]:
    """See `FastState`; the level leaves out the biases."""
    del config
    start = Weights(initial.get("memory_hidden"), initial["memory_output"])
    weight = ttt.matrices(self.memory.now.weight)
    return {"memory": Level(start, weight, None)}

  def reset(self, level: str, config: ModelConfig) -> "TTTState":
    """See `FastState`."""
    if level != "memory":
      return super().reset(level, config)
    return dataclasses.replace(self, memory=self.memory.reset())


def init_state(
  config: ModelConfig, batch_size: int, read_size: int | None = None
) -> TTTState:
  """Fast state before the first token: W_t = W_0."""
  is_shape = lambda x: isinstance(x, tuple) and isinstance(x[0], int)
  initial = jax.tree.map(jnp.zeros, initial_shapes(config), is_leaf=is_shape)
  return TTTState(
    chunks.fresh(
      chunks.zero_state(initial, batch_size),
      config.memory.chunk_length,
      read_size,
    ),
    layers.init_conv_state(config, batch_size, _conv_widths(config)),
  )


class Initial(nn.Module):
  """Learned starts of the memory, LN, and the learned part [C] of c_t.

  W_0 starts from N(0, 0.02), in the MLP's output layer from
  N(0, 0.02 / sqrt(2 L)) in a model of L layers; b_0 starts at 0, LN's scale at
  1 and its bias at 0, the learned part of c_t at 0.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self) -> tuple[Weights, ttt.Norm, jax.Array]:
    heads, dim = self.config.num_heads, self.config.head_dim
    shapes = initial_shapes(self.config)

    def layer(name: str, shape: ttt.Layer | None) -> Tree:
      if shape is None:
        return None
      axes = ("heads", "memory_out", "memory_in")
      is_second = name == "output" and shapes.hidden is not None
      depth = 2 * self.config.num_layers if is_second else 1
      normal = nn.initializers.normal(layers.INIT_STD / depth**0.5)
      return ttt.Layer(
        self._parameter(f"memory_{name}", normal, shape.weight, axes),
        self._parameter(f"bias_{name}", _zeros, shape.bias, axes[:2]),
      )

    weights = Weights(*map(layer, shapes._fields, shapes))
    axes = ("heads", "norm")
    norm = ttt.Norm(
      self._parameter("norm_scale", nn.initializers.ones, (heads, dim), axes),
      self._parameter("norm_bias", _zeros, (heads, dim), axes),
    )
    length = (self.config.memory.chunk_length,)
    position = self._parameter("position", _zeros, length, (None,))
    return weights, norm, position

  def _parameter(
    self, name: str, init: Initializer, shape: Tree, axes: Tree
  ) -> Tree:
    return parameter(
      self, name, init, shape, axes, role="initial", owner=("memory",)
    )


_zeros = nn.initializers.zeros


class TestTimeTraining(nn.Module):
  """The sequence layer of both models."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: TTTState | None = None,
    documents: jax.Array | None = None,
    stream_BTD: jax.Array | None = None,
  ) -> MixerOutput:
    cfg, conv = self.config, {}

    def convolve(name: str, x: jax.Array) -> jax.Array:
      if not cfg.conv_window:
        return x
      x, conv[name] = layers.ShortConv(
        cfg.conv_window,
        x.dtype,
        use_bias=True,
        is_normal=True,
        name=f"conv_{name}",
      )(x, state.conv[name] if state else None, documents)
      return x

    first_BTD = jnp.zeros_like(x_BTD)
    if cfg.conv_window:
      assert stream_BTD is not None
      first_BTD = convolve("block", x_BTD)
      x_BTD = layers.rms_norm(cfg, "norm")(stream_BTD + first_BTD)
    dense = lambda name: layers.dense(cfg.width, cfg, ("embed", "heads"), name)
    shared, value = dense("query_key")(x_BTD), dense("value")(x_BTD)
    before = state.memory if state else None
    place = ttt.position(x_BTD.shape[1], before, cfg.memory)
    q, k = (
      self._rotate(convolve(name, shared), place) for name in ("query", "key")
    )
    initial, norm, learned = Initial(cfg, name="initial")()
    weight = jnp.maximum(0.0, 1.0 / (1 + place) + learned[place])
    rate = self._learn_rate(x_BTD)
    per_token = lambda x: jnp.broadcast_to(x[None, None], rate.shape)
    tokens = ttt.Tokens(
      keys=k,
      values=layers.split_heads(value, cfg.num_heads),
      queries=q,
      learn_rate=rate,
      factor=per_token(weight),
      is_last=per_token((place == cfg.memory.chunk_length - 1) * 1.0),
    )
    out = ttt.run_memory(
      initial,
      norm,
      tokens,
      cfg.memory,
      state=before,
      documents=documents,
      writes=cfg.is_live("memory"),
      with_dynamics=layers.wants_dynamics(self),
    )
    layers.sow_dynamics(self, "memory", out.dynamics)
    if state is not None:
      state = TTTState(out.state, conv)
    y_BTD = first_BTD + ReadOut(cfg, name="readout")(x_BTD, out.outputs)
    keys = layers.merge_heads(k)
    return MixerOutput(y_BTD, keys, value, state)

  def _rotate(self, x_BTD: jax.Array, place: jax.Array) -> jax.Array:
    """[B, T, D] -> [B, H, T, K], rotated by the position in the mini-batch."""
    x = layers.split_heads(x_BTD, self.config.num_heads).swapaxes(1, 2)
    return rotary.rotate(x, place, self.config.rope_base).swapaxes(1, 2)

  def _learn_rate(self, x_BTD: jax.Array) -> jax.Array:
    """eta, [B, H, T]."""
    cfg = self.config
    logits = nn.Dense(
      cfg.num_heads,
      kernel_init=boxed(
        nn.initializers.normal(layers.INIT_STD),
        ("embed", "heads"),
        "gate",
        ("memory",),
      ),
      bias_init=boxed(_zeros, ("heads",), "gate", ("memory",)),
      name="gates",
    )(x_BTD.astype(jnp.float32))
    rate = cfg.memory.initial_learn_rate / cfg.head_dim
    return rate * nn.sigmoid(logits).swapaxes(1, 2)


class ReadOut(nn.Module):
  """W_o (LN(o) * gelu(n W_g))."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, o_BHTK: jax.Array) -> jax.Array:
    cfg = self.config
    o_BTD = layer_normalize(layers.merge_heads(o_BHTK))
    of_norm = lambda name, init: parameter(
      self, name, init, (cfg.width,), ("norm",), role="norm"
    )
    scale = of_norm("norm_scale", nn.initializers.ones)
    bias = of_norm("norm_bias", _zeros)
    o_BTD = o_BTD * scale[None, None] + bias[None, None]
    gate = layers.dense(cfg.width, cfg, ("embed", "heads"), "gate")(x_BTD)
    return layers.dense(
      cfg.width, cfg, ("heads", "embed"), "output", is_output=True
    )(o_BTD.astype(gate.dtype) * nn.gelu(gate))


class TTTBlock(Block):
  """The block with a sequence layer that also reads the residual stream."""

  def mix(
    self, x_BTD: jax.Array, state: Tree, documents: jax.Array | None
  ) -> MixerOutput:
    """The sequence layer's output for the normalised stream."""
    normed = layers.rms_norm(self.config, "norm_mixer")(x_BTD)
    mixer = TestTimeTraining(self.config, name="mixer")
    return mixer(normed, state, documents, x_BTD)


def describe(config: ModelConfig) -> list[Problem]:
  """See `models/interface.py`."""
  length = config.memory.chunk_length
  problem = Problem(
    name="memory",
    frequency=Fraction(1, length),
    context=f"(k, v) of the last {length} tokens",
    objective="1/2 ‖k + LN(M(k)) - v‖²",
    rule="GD, step eta by position; momentum: none; retention: none; error"
    " clip: 0; read: token_post",
    transfer=f"{META_LEARNED}; q, k, v and eta by slow projections",
  )
  return [problem]
