"""Titans beside attention: memory as a gate, as a layer, as a context.

  MAG  y = A(n) * sigmoid(RMS(L(n)))
  MAL  y = A(RMS(L(n)))
  MAC  per segment of C tokens, M the memory before it:
         h_i = RMS_head(M(q(n_i)))
         y_i = attention of token i to [persistent | h_1 .. h_i | n_1 .. n_i]
         M learns k(y_i) -> v(y_i);  o_i = y_i * RMS_head(M_i(q(y_i)))

with L Titans' memory layer (`titans.py`) and A attention with a window
(`attention.py`), both with their projections; MAC's output is o W_o.

Source: Titans 2501.00663, section 4.  Deviations: persistent tokens (MAG, MAC)
are keys and values, which is what attention makes of the paper's tokens; the
memory does not read them, as its learned start does the same.  MAG's gate is
normalised, its attention branch is not.  MAC's h_i is masked to the tokens
that may know n_i, and its memory is read at the token (`token_post`), where the
paper reads it after the segment, which would show a token its successors.
MAC's convolutions act on the attention's q, k and v only.

Legend: B batch, T tokens, N segments, C segment length, D model, H heads,
K head dim, P persistent tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hope_jax.memory import architectures, chunks, deep, rules, self_modifying
from hope_jax.memory.architectures import l2_normalize, rms_normalize
from hope_jax.model_config import ModelConfig
from hope_jax.models import attention, layers, titans
from hope_jax.models.interface import MixerOutput


def init_state(
  config: ModelConfig, batch_size: int, piece_length: int | None = None
) -> dict[str, Any]:
  """MAG and MAL: the memory's state and attention's."""
  return {
    **titans.init_state(config, batch_size, piece_length),
    "attention": attention.init_state(config, batch_size),
  }


class MemoryAndAttention(titans.SelfModifyingTitans):
  """MAG and MAL."""

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: dict[str, Any] | None = None,
    segments: jax.Array | None = None,
  ) -> MixerOutput:
    cfg = self.config
    read = super().__call__(x_BTD, state, segments)
    normed = layers.rms_norm(cfg, "norm_memory")(read.y)
    is_gate = cfg.sequence_layer == "titans_mag"
    attended = attention.Attention(cfg, name="attention")(
      x_BTD if is_gate else normed,
      state["attention"] if state else None,
      segments,
    )
    y_BTD = attended.y
    if is_gate:
      y_BTD = y_BTD * nn.sigmoid(normed)
    if state is not None:
      state = {**read.state, "attention": attended.state}
    return MixerOutput(y_BTD, read.keys, read.values, state)


def init_context_state(
  config: ModelConfig, batch_size: int, piece_length: int | None = None
) -> dict[str, Any]:
  """MAC: the memory; its segment's keys and values, if it may be cut."""
  state = titans.init_state(config, batch_size, piece_length)
  memory, length = state["memory"], config.memory.chunk_length
  if memory.position is not None:
    heads = config.num_heads, config.head_dim
    empty = jnp.zeros((batch_size, 2, length, *heads), jnp.float32)
    filled = jnp.zeros((batch_size, length), jnp.float32)
    now = {**memory.now, "segment": Segment(empty, empty, filled)}
    memory = memory.replace(now=now)
  conv = layers.full_widths(config)
  return {
    "memory": memory,
    "conv": layers.init_conv_state(config, batch_size, conv),
  }


class Segment(NamedTuple):
  """What attention sees of a segment: keys and values [B, 2, C, H, K], of the
  h_i and of the tokens; filled [B, C]: which places hold a token (0 or 1)."""

  keys: jax.Array
  values: jax.Array
  filled: jax.Array

  def insert(self, new: "Segment", place: jax.Array) -> "Segment":
    """With tokens at `place` [C']; those not `filled` are left out."""
    is_here = place[:, None] == jnp.arange(self.filled.shape[1])[None]
    is_here = new.filled[..., None] * is_here[None]
    kept = 1.0 - jnp.sum(is_here, axis=1)

    def put(old: jax.Array, x: jax.Array) -> jax.Array:
      x = jnp.einsum("BSC,BGSHK->BGCHK", is_here, x)
      return kept[:, None, :, None, None] * old + x

    return Segment(
      put(self.keys, new.keys),
      put(self.values, new.values),
      jnp.maximum(self.filled, 1.0 - kept),
    )


class MemoryAsContext(nn.Module):
  """MAC."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: dict[str, Any] | None = None,
    segments: jax.Array | None = None,
  ) -> MixerOutput:
    cfg, shape = self.config, x_BTD.shape
    before = state["memory"] if state else None
    projected, conv = layers.projections(
      x_BTD,
      layers.full_widths(cfg),
      cfg,
      state["conv"] if state else None,
      segments,
    )
    kernels = _Kernels(
      key=self._kernel_of("key"),
      value=self._kernel_of("value"),
      memory_q=self._kernel("memory_q"),
      memory_k=self._kernel("memory_k"),
      memory_v=self._kernel("memory_v"),
    )
    by_head = lambda x: x.astype(jnp.float32).reshape(
      *shape[:2], cfg.num_heads, -1
    )
    tokens = _Tokens(
      query=by_head(projected["query"]),
      key=by_head(projected["key"]),
      value=by_head(projected["value"]),
      retrieval=kernels.vectors(x_BTD, "memory_q", cfg),
      gates=self._gates(x_BTD),
    )
    initial, _ = titans.InitialWeights(cfg, name="initial")()
    persistent = attention.PersistentTokens(cfg, name="persistent")()
    out = run_segments(
      tokens,
      kernels,
      initial,
      persistent,
      cfg,
      state=before,
      segments=segments,
      with_dynamics=layers.wants_dynamics(self),
    )
    layers.sow_dynamics(self, "memory", out.dynamics)
    if state is not None:
      state = {"memory": out.state, "conv": conv}
    y_BTD = layers.dense(
      cfg.width, cfg, ("heads", "embed"), "output", is_output=True
    )(out.outputs.reshape(shape).astype(x_BTD.dtype))
    return MixerOutput(y_BTD, projected["key"], projected["value"], state)

  def _gates(self, x_BTD: jax.Array) -> rules.Gates:
    cfg = self.config.memory
    made = titans.Gates(self.config, name="gates")(x_BTD)
    gates = self_modifying.open_gates(
      made["eta"], made["alpha"], made.get("beta"), cfg
    )
    return gates._replace(retention=rules.retained(gates.retention, cfg))

  def _kernel_of(self, name: str) -> jax.Array:
    """The matrix of a projection that was made before."""
    return nn.unbox(self.variables["params"][name]["kernel"])

  def _kernel(self, name: str) -> Any:
    init = nn.with_logical_partitioning(
      nn.initializers.normal(layers.INIT_STD), ("embed", "heads")
    )
    return self.param(name, init, (self.config.width, self.config.width))


class _Kernels(NamedTuple):
  """Matrices [D, D]: attention's key and value, which the h_i share with the
  tokens, and the memory's q, k and v."""

  key: jax.Array
  value: jax.Array
  memory_q: jax.Array
  memory_k: jax.Array
  memory_v: jax.Array

  def heads(
    self, x_BTD: jax.Array, name: str, config: ModelConfig
  ) -> jax.Array:
    """x W in the model's dtype, [B, H, T, K] in float32."""
    dtype = jnp.dtype(config.dtype)
    y = x_BTD.astype(dtype) @ getattr(self, name).astype(dtype)
    return layers.split_heads(y, config.num_heads)

  def vectors(
    self, x_BTD: jax.Array, name: str, config: ModelConfig
  ) -> jax.Array:
    """SiLU(x W), of norm 1 for q and k."""
    y = nn.silu(self.heads(x_BTD, name, config))
    return y if name == "memory_v" else l2_normalize(y)


class _Tokens(NamedTuple):
  """What a segment's tokens bring along: attention's query, key and value
  [B, T, H, K], not rotated; q(n_i) for h_i [B, H, T, K]; gates [B, H, T]."""

  query: Any
  key: Any
  value: Any
  retrieval: Any
  gates: Any


def run_segments(
  tokens: _Tokens,
  kernels: _Kernels,
  initial: Any,
  persistent: attention.Persistent | None,
  config: ModelConfig,
  *,
  state: chunks.ChunkState | None,
  segments: jax.Array | None,
  with_dynamics: bool = False,
) -> deep.MemoryOutput:
  """o [B, T, H, K] of all tokens, and the state after them."""
  cfg = config.memory
  batch, length = tokens.query.shape[:2]
  continued = state is not None
  layout = chunks.plan(length, cfg.chunk_length, state)
  if state is None:
    state = chunks.fresh(deep.zero_state(initial, batch, cfg))
  place = jnp.arange(layout.length)
  if state.position is not None and layout.length < cfg.chunk_length:
    place = state.position[None]  # one token
  slow, state, origin = deep.anchored(initial, state, cfg)
  base = chunks.per_sequence(slow, batch, ("heads",))
  split = lambda tree, axis: jax.tree.map(lambda x: layout.split(x, axis), tree)
  xs = _Tokens(*split(tokens[:3], 1), *split(tokens[3:], 2))
  decays = rules.subchunk_decays(xs.gates, layout.live, rules.rule_read(cfg))
  weights = initial, base
  (outputs, dynamics), after = chunks.scan_chunks(
    _segment_step(weights, kernels, persistent, place, config, with_dynamics),
    state,
    (xs, decays),
    layout,
    chunk_length=cfg.chunk_length,
    policy=cfg.remat,
    continued=continued,
    docs=chunks.documents(segments, layout, origin),
  )
  return deep.MemoryOutput(
    layout.merge(outputs, axis=1),
    deep.difference(initial, after, cfg),
    None if dynamics is None else deep.summarize(dynamics),
  )


def _segment_step(
  weights: tuple[Any, Any],
  kernels: _Kernels,
  persistent: attention.Persistent | None,
  place: jax.Array,
  config: ModelConfig,
  with_dynamics: bool,
) -> Callable:
  """What `chunks.scan_chunks` does with a segment -> (o, dynamics).

  `weights`: M_0, and the same per sequence."""
  cfg, (initial, base) = config.memory, weights

  def step(start, now, inputs, is_token):
    tokens, decays = inputs
    whole = architectures.whole(base, start)
    read = architectures.forward(whole, tokens.retrieval, cfg.activation)
    h_BTD = layers.merge_heads(rms_normalize(read.outputs))
    y_BTHK, segment = _attend(
      tokens, h_BTD, kernels, persistent, place, is_token, now, config
    )
    y_BTD = y_BTHK.reshape(h_BTD.shape)
    q, k, v = (
      kernels.vectors(y_BTD, f"memory_{x}", config) for x in ("q", "k", "v")
    )
    after = {x: now[x] for x in ("weight", "momentum")}
    query = q, deep.slow_hidden(base, q)
    dynamics = None
    if config.is_live("memory"):
      loss = deep.inner_loss(start, base, k, v, cfg)
      after, read = deep.learn_chunk(
        start, now, loss, k, query, tokens.gates, decays, cfg
      )
      o = deep.read_out(base, q, read)
      if with_dynamics:
        dynamics = deep.dynamics_of(
          initial, after, tokens.gates, k, cfg, base, loss
        )
    else:
      o = architectures.forward(whole, q, cfg.activation).outputs
    if segment is not None:
      after["segment"] = segment
    return after, (y_BTHK * rms_normalize(o).swapaxes(1, 2), dynamics)

  return step


def _attend(
  tokens: _Tokens,
  h_BTD: jax.Array,
  kernels: _Kernels,
  persistent: attention.Persistent | None,
  place: jax.Array,
  is_token: jax.Array | None,
  now: dict[str, Any],
  config: ModelConfig,
) -> tuple[jax.Array, Segment | None]:
  """y [B, C, H, K] of a segment's tokens at `place` [C], and the segment as it
  is kept for the next ones.  The h_i lie C places before the tokens."""
  batch, count = tokens.query.shape[:2]
  length = config.memory.chunk_length
  turn = lambda x, place: attention.turned(x, place, config)
  h_key, h_value = (
    kernels.heads(h_BTD, x, config).swapaxes(1, 2) for x in ("key", "value")
  )
  keys = turn(h_key, place), turn(tokens.key, length + place)
  filled = jnp.ones((batch, count), jnp.float32)
  if is_token is not None:
    filled = filled * is_token[None]
  segment = Segment(
    jnp.stack(keys, 1), jnp.stack([h_value, tokens.value], 1), filled
  )
  kept, places = None, place
  if "segment" in now:
    segment = kept = now["segment"].insert(segment, place)
    places = jnp.arange(length)
  seen = places[None] <= place[:, None]
  seen = seen[None] & (segment.filled[:, None] > 0)
  y = attention.attend(
    turn(tokens.query, length + place),
    _joined(segment.keys),
    _joined(segment.values),
    jnp.concatenate([seen, seen], axis=-1)[:, None],
    tokens.query,
    persistent,
  )
  return y, kept


def _joined(x: jax.Array) -> jax.Array:
  """[B, 2, C, H, K] -> [B, 2 C, H, K]."""
  return x.reshape(x.shape[0], -1, *x.shape[3:])
