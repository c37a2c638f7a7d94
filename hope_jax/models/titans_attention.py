"""Titans with attention: memory as a gate, as a layer, as a context.

  MAG  y = A(n) * sigmoid(RMS(L(n)))
  MAL  y = A(RMS(L(n)))
  MAC  per segment of C tokens, M the memory before it:
         h_i = RMS_head(M(q(n_i)))
         y_i = attention of token i to [persistent | h_1 .. h_i | n_1 .. n_i]
         M learns k(y_i) -> v(y_i);  o_i = y_i * RMS_head(M_i(q(y_i)))

with L Titans' memory layer (`titans.py`) and A attention with a window
(`attention.py`), both with their projections; MAC's output is o W_o.

Source: Titans 2501.00663, section 4.  Deviations: persistent tokens (MAG, MAC)
are learned directly as keys and values, into which attention would project the
paper's tokens; the memory does not read them, since its learned start serves
the same purpose.  MAG's gate is normalised, its attention branch is not.  In
MAC only token i and its successors see h_i, and the memory is read at the token
(`token_post`); the paper reads it after the segment, which would show a token
its successors.  MAC's convolutions act on the attention's q, k and v only.

Legend: B batch, T tokens, N segments, C segment length, D model, H heads,
K head dim, P persistent tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree

from hope_jax.config import ModelConfig
from hope_jax.memory import architectures, chunks, deep, rules, self_modifying
from hope_jax.memory.norms import l2_normalize, rms_normalize
from hope_jax.models import attention, layers, problems, rotary, titans
from hope_jax.models.attention import AttentionState
from hope_jax.models.interface import (
  FastState,
  Level,
  MixerOutput,
  Problem,
  owned,
)
from hope_jax.models.parameters import parameter


@flax.struct.dataclass
class BesideState(titans.TitansState):
  """The state of MAG and MAL: the memory's and attention's."""

  attention: AttentionState = owned("attention")


def init_state(
  config: ModelConfig, batch_size: int, read_size: int | None = None
) -> BesideState:
  """MAG and MAL: D = 0 and an empty cache."""
  memory = titans.init_state(config, batch_size, read_size)
  return BesideState(
    memory.memory,
    memory.boxes,
    memory.conv,
    attention.init_state(config, batch_size),
  )


class MemoryAndAttention(nn.Module):
  """The sequence layer of MAG and MAL."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: BesideState | None = None,
    documents: jax.Array | None = None,
  ) -> MixerOutput:
    cfg = self.config
    read = titans.read(self, cfg, x_BTD, state, documents)
    normed = layers.rms_norm(cfg, "norm_memory")(read.y)
    is_gate = cfg.sequence_layer == "titans_mag"
    attended = attention.Attention(cfg, name="attention")(
      x_BTD if is_gate else normed,
      state.attention if state else None,
      documents,
    )
    y_BTD = attended.y
    if is_gate:
      y_BTD = y_BTD * nn.sigmoid(normed)
    state = read.state
    if state is not None:
      state = dataclasses.replace(state, attention=attended.state)
    return MixerOutput(y_BTD, read.keys, read.values, state)


@flax.struct.dataclass
class ContextState(FastState):
  """The state of MAC: the memory, with its segment's keys and values if calls
  may end inside one, and the convolutions' last inputs."""

  memory: chunks.ChunkState = owned("memory")
  conv: dict[str, jax.Array] = owned("projections")

  def fast_levels(
    self, initial: Mapping[str, Tree], config: ModelConfig
  ) -> dict[str, Level]:
    """See `FastState`."""
    del config
    return {"memory": titans.memory_level(initial, self.memory)}

  def reset(self, level: str, config: ModelConfig) -> "ContextState":
    """See `FastState`."""
    if level != "memory":
      return super().reset(level, config)
    return dataclasses.replace(self, memory=self.memory.reset())


def init_context_state(
  config: ModelConfig, batch_size: int, read_size: int | None = None
) -> ContextState:
  """MAC: D = 0, an empty segment."""
  state = titans.init_state(config, batch_size, read_size)
  memory, length = state.memory, config.memory.chunk_length
  if memory.position is not None:
    heads = config.num_heads, config.head_dim
    empty = jnp.zeros((batch_size, 2, length, *heads), jnp.float32)
    filled = jnp.zeros((batch_size, length), jnp.float32)
    now = dataclasses.replace(memory.now, segment=Segment(empty, empty, filled))
    memory = dataclasses.replace(memory, now=now)
  return ContextState(memory, state.conv)


class Segment(NamedTuple):
  """A segment as attention sees it: keys and values [B, 2, C, H, K] of the h_i
  and of the tokens; filled [B, C] says which places hold a token (0 or 1)."""

  keys: jax.Array
  values: jax.Array
  filled: jax.Array

  def insert(self, new: "Segment", place: jax.Array) -> "Segment":
    """Puts `new` at places `place` [C'], without those not `filled`."""
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
  """The sequence layer of MAC."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: ContextState | None = None,
    documents: jax.Array | None = None,
  ) -> MixerOutput:
    cfg, shape = self.config, x_BTD.shape
    made = {
      name: layers.Matrix(cfg, name=name)(x_BTD)
      for name in ("query", "key", "value")
    }
    projected, conv = layers.convolve(
      {name: p for name, (p, _) in made.items()},
      cfg,
      state.conv if state else None,
      documents,
    )
    kernels = _Kernels(
      key=made["key"][1],
      value=made["value"][1],
      memory_q=self._kernel("memory_q"),
      memory_k=self._kernel("memory_k"),
      memory_v=self._kernel("memory_v"),
    )
    by_head = lambda x: layers.split_heads(x, cfg.num_heads)
    tokens = _Tokens(
      query=by_head(projected["query"]),
      key=by_head(projected["key"]),
      value=by_head(projected["value"]),
      retrieval=kernels.vectors(x_BTD, "memory_q", cfg),
      gates=self._gates(x_BTD),
    )
    initial, _ = titans.InitialWeights(cfg, name="initial")()
    persistent = attention.PersistentTokens(cfg, name="persistent")()
    out = chunks.run(
      _memory(initial, _Slow(kernels, persistent), cfg),
      initial,
      tokens,
      axis=2,
      state=state.memory if state else None,
      documents=documents,
      with_dynamics=layers.wants_dynamics(self) and cfg.is_live("memory"),
    )
    layers.sow_dynamics(self, "memory", out.dynamics)
    if state is not None:
      state = ContextState(out.state, conv)
    o_BTD = layers.merge_heads(out.outputs)
    y_BTD = layers.dense(
      cfg.width, cfg, ("heads", "embed"), "output", is_output=True
    )(o_BTD.reshape(shape).astype(x_BTD.dtype))
    return MixerOutput(y_BTD, projected["key"], projected["value"], state)

  def _gates(self, x_BTD: jax.Array) -> rules.Gates:
    cfg = self.config.memory
    made = titans.Gates(self.config, name="gates")(x_BTD)
    gates = self_modifying.open_gates(
      made["eta"], made["alpha"], made.get("beta"), cfg
    )
    return rules.retained(gates, cfg)

  def _kernel(self, name: str) -> Tree:
    shape = self.config.width, self.config.width
    init = nn.initializers.normal(layers.INIT_STD)
    return parameter(self, name, init, shape, ("embed", "heads"))


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


class _Slow(NamedTuple):
  """What all segments share: the matrices and the persistent tokens."""

  kernels: _Kernels
  persistent: attention.Persistent | None


class _Tokens(NamedTuple):
  """Inputs per token: attention's query, key and value before rotation, and
  q(n_i) for h_i, [B, H, T, K] each; gates [B, H, T]."""

  query: jax.Array
  key: jax.Array
  value: jax.Array
  retrieval: jax.Array
  gates: rules.Gates


class _Inputs(NamedTuple):
  """A segment's tokens, and the decays from their gates."""

  tokens: _Tokens
  decays: Tree


def _memory(initial: Tree, slow: _Slow, config: ModelConfig) -> chunks.Memory:
  """MAC's attention and memory, as functions of one segment."""
  cfg, is_live = config.memory, config.is_live("memory")

  def lay_out(tokens, live):
    read = rules.rule_read(cfg)
    return _Inputs(tokens, rules.subchunk_decays(tokens.gates, live, read))

  def step(base, start, now, x, places):
    tokens = x.tokens
    whole = architectures.whole(base, start)
    read = architectures.forward(whole, tokens.retrieval, cfg.activation)
    h_BTD = layers.merge_heads(rms_normalize(read.outputs))
    y_BTHK, segment = _attend(
      tokens, h_BTD, slow, now.segment, places, config=config
    )
    y_BTD = y_BTHK.reshape(h_BTD.shape)
    q, k, v = (
      slow.kernels.vectors(y_BTD, f"memory_{x}", config)
      for x in ("q", "k", "v")
    )
    after, learned = now, None
    if is_live:
      loss = deep.inner_loss(start, base, k, v, cfg)
      chunk = deep.Chunk(
        deep.Tokens(k, v, q, tokens.gates), deep.slow_hidden(base, q), x.decays
      )
      after, read = deep.learn_chunk(start, now, loss, chunk, cfg)
      o = deep.read_out(base, q, read)
      learned = loss, k
    else:
      o = architectures.forward(whole, q, cfg.activation).outputs
    after = dataclasses.replace(after, segment=segment)
    return after, y_BTHK.swapaxes(1, 2) * rms_normalize(o), learned

  def dynamics(base, after, learned, x, places):
    loss, keys = learned
    chunk = deep.Learned(after, x.tokens.gates, keys, loss)
    return deep.dynamics_of(initial, base, chunk, cfg)

  return chunks.Memory(
    cfg.chunk_length,
    cfg.remat,
    step,
    lay_out=lay_out,
    dynamics=dynamics,
    has_momentum=cfg.momentum != "none",
    acts_on_whole=cfg.retention == "zero",
  )


def _attend(
  tokens: _Tokens,
  h_BTD: jax.Array,
  slow: _Slow,
  before: Segment | None,
  places: chunks.Places,
  *,
  config: ModelConfig,
) -> tuple[jax.Array, Segment | None]:
  """(y [B, C, H, K] of a segment's tokens, the segment to keep in the state).

  For rotary positions h_i is C places before token i.
  """
  query, key, value = (
    x.swapaxes(1, 2) for x in (tokens.query, tokens.key, tokens.value)
  )
  batch, count = query.shape[:2]
  length, place = config.memory.chunk_length, places.index
  assert place is not None
  turn = lambda x, place: rotary.rotate_positions(x, place, config)
  h_key, h_value = (
    slow.kernels.heads(h_BTD, x, config).swapaxes(1, 2)
    for x in ("key", "value")
  )
  keys = turn(h_key, place), turn(key, length + place)
  filled = jnp.ones((batch, count), jnp.float32)
  if places.live is not None:
    filled = filled * places.live[None]
  segment = Segment(jnp.stack(keys, 1), jnp.stack([h_value, value], 1), filled)
  kept, seen_places = None, place
  if before is not None:
    segment = kept = before.insert(segment, place)
    seen_places = jnp.arange(length)
  seen = seen_places[None] <= place[:, None]
  seen = seen[None] & (segment.filled[:, None] > 0)
  y = attention.attend(
    turn(query, length + place),
    _joined(segment.keys),
    _joined(segment.values),
    jnp.concatenate([seen, seen], axis=-1)[:, None],
    plain=query,
    persistent=slow.persistent,
  )
  return y, kept


def describe(config: ModelConfig) -> list[Problem]:
  """Attention and the memory; see `models/interface.py`."""
  found = attention.describe(config)
  if config.sequence_layer == "titans_mac":
    length = config.memory.chunk_length
    found = [problems.attention(f"segment's tokens, {length:,}, and of M")]
  return found + problems.deep_memories(config)


def _joined(x: jax.Array) -> jax.Array:
  """[B, 2, C, H, K] -> [B, 2 C, H, K]."""
  return x.reshape(x.shape[0], -1, *x.shape[3:])
