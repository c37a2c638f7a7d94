"""Softmax attention with rotary positions (Transformer++, Hope-Attention).

Attention is causal, with RoPE on q and k and optional causal depthwise
convolutions on q, k and v; groups of query heads may share a head of keys and
values (2305.13245).  With `attention_window` W, token t sees only tokens
t - W + 1 .. t (Samba's attention, 2406.07522): each block of W queries attends
to two blocks of keys, so that time and memory grow with T W.  For a sequence
that is read in parts, the state is a cache of `context_length` positions or,
with a window, of the last W.

Legend: B batch, T tokens, L cache places, W window, H heads (G of keys and
values), K head dim, D model.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from hope_jax.config import ModelConfig
from hope_jax.models import layers, problems, rotary
from hope_jax.models.interface import FastState, MixerOutput, Problem, owned
from hope_jax.models.parameters import parameter
from pallas_kernels.common.scan import fold_chunks


@flax.struct.dataclass
class AttentionState(FastState):
  """The cache: keys and values [B, L, G, K].

  Attributes:
    position: number of filled places (a prefix); with a window the cache is
      always full and right-aligned.
    first: [B] the place where the last token's document begins.
    keys: with a window stored before rotation, because positions shift.
  """

  keys: jax.Array = owned("attention")
  values: jax.Array = owned("attention")
  position: jax.Array = owned("attention")
  first: jax.Array = owned("attention")
  conv: dict[str, jax.Array] = owned("projections")


def widths(config: ModelConfig) -> dict[str, int]:
  """Widths: H K of queries, G K of keys and values."""
  of_group = config.kv_heads * config.head_dim
  return {"query": config.width, "key": of_group, "value": of_group}


def init_state(
  config: ModelConfig, batch_size: int, read_size: int | None = None
) -> AttentionState:
  """An empty cache."""
  del read_size
  dtype = jnp.dtype(config.dtype)
  window = config.attention_window
  places = window or config.context_length
  shape = (batch_size, places, config.kv_heads, config.head_dim)
  return AttentionState(
    keys=jnp.zeros(shape, dtype),
    values=jnp.zeros(shape, dtype),
    position=jnp.full((), window, jnp.int32),
    first=jnp.full(batch_size, window, jnp.int32),
    conv=layers.init_conv_state(config, batch_size, widths(config)),
  )


def document_place(
  state: AttentionState, documents: jax.Array | None
) -> jax.Array:
  """[B]: the place where the last token's document begins, once tokens with
  document numbers [B, T] follow the `position` filled places."""
  if documents is None:
    return state.first
  is_last = documents == documents[:, -1:]
  place = state.position + jnp.argmax(is_last, axis=1).astype(jnp.int32)
  return jnp.where(documents[:, -1] == 0, state.first, place)


def cache_numbers(state: AttentionState) -> jax.Array:
  """Document numbers of the cache's places [B, L]: 0 in the last document, -1
  in earlier ones (and 0 at places not yet filled)."""
  place = jnp.arange(state.keys.shape[1])
  return jnp.where(place[None] >= state.first[:, None], 0, -1)


class Persistent(NamedTuple):
  """Learned keys and values [P, G, K] that every token sees."""

  keys: jax.Array
  values: jax.Array


class PersistentTokens(nn.Module):
  """Titans' persistent memory as keys and values of attention, or None."""

  config: ModelConfig

  @nn.compact
  def __call__(self) -> Persistent | None:
    cfg = self.config
    if not cfg.persistent_tokens:
      return None
    return Persistent(self._tokens("key"), self._tokens("value"))

  def _tokens(self, name: str) -> jax.Array:
    cfg = self.config
    shape = cfg.persistent_tokens, cfg.kv_heads, cfg.head_dim
    init = nn.initializers.normal(layers.INIT_STD)
    axes = None, "heads", None
    return parameter(self, name, init, shape, axes, owner=("attention",))


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array,
  *,
  plain: jax.Array,
  persistent: Persistent | None,
) -> jax.Array:
  """Attention of q [B, T, H, K] to k, v [B, S, G, K] where `mask` [B, 1, T, S]
  allows, and of `plain`, the queries before rotation, to persistent tokens.

  Both share one softmax: (q, plain) attends to (k, 0) and (0, persistent keys).
  """
  if persistent is None:
    return jax.nn.dot_product_attention(q, k, v, mask=mask)
  dim = q.shape[-1]
  beside = lambda a, b: jnp.concatenate([a, b], axis=-1)

  def before(learned: jax.Array, x: jax.Array) -> jax.Array:
    """[B, P + S, ...], the learned tokens first."""
    wide = jnp.broadcast_to(learned[None], (len(x), *learned.shape))
    return jnp.concatenate([wide.astype(x.dtype), x], axis=1)

  zero = jnp.zeros_like(persistent.keys)
  k = before(beside(zero, persistent.keys), beside(k, jnp.zeros_like(k)))
  v = before(beside(persistent.values, zero), beside(v, jnp.zeros_like(v)))
  seen = jnp.pad(
    mask,
    ((0, 0), (0, 0), (0, 0), (len(zero), 0)),
    constant_values=True,
  )
  y = jax.nn.dot_product_attention(
    beside(q, plain.astype(q.dtype)), k, v, mask=seen, scale=dim**-0.5
  )
  return y[..., :dim]


def full_pass(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  documents: jax.Array | None,
  config: ModelConfig,
) -> jax.Array:
  """Causal attention within whole sequences [B, T, H or G, K]."""
  position = jnp.arange(q.shape[1])
  q, k = (rotary.rotate_positions(x, position, config) for x in (q, k))
  mask = None
  if documents is not None:
    mask = (documents[:, :, None] == documents[:, None, :])[:, None]
  return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)


class Heads(NamedTuple):
  """Queries [B, T, H, K], keys and values [B, T, G, K] of tokens."""

  q: jax.Array
  k: jax.Array
  v: jax.Array


def full_extend(
  tokens: Heads,
  documents: jax.Array | None,
  state: AttentionState,
  config: ModelConfig,
) -> tuple[jax.Array, AttentionState]:
  """Causal attention of tokens that follow a cache."""
  q, k, v = tokens
  begin, length = state.position, q.shape[1]
  position = begin + jnp.arange(length)
  q, k = (rotary.rotate_positions(x, position, config) for x in (q, k))
  insert = jax.lax.dynamic_update_slice_in_dim
  keys = insert(state.keys, k, begin, axis=1)
  values = insert(state.values, v, begin, axis=1)
  if documents is None:
    documents = jnp.zeros(q.shape[:2], jnp.int32)
  numbers = insert(cache_numbers(state), documents, begin, axis=1)
  past = jnp.arange(keys.shape[1])[None] <= position[:, None]
  mask = past[None] & (documents[:, :, None] == numbers[:, None])
  y = jax.nn.dot_product_attention(q, keys, values, mask=mask[:, None])
  first = document_place(state, documents)
  return y, dataclasses.replace(
    state, keys=keys, values=values, position=begin + length, first=first
  )


def window_extend(
  tokens: Heads,
  documents: jax.Array | None,
  state: AttentionState,
  config: ModelConfig,
  *,
  persistent: Persistent | None = None,
) -> tuple[jax.Array, AttentionState]:
  """`full_extend` with a window: each block of C = min(W, T) queries attends to
  its own keys and to the W before them."""
  q, k, v = tokens
  batch, length, *heads = q.shape
  window = config.attention_window
  block = min(window, length)
  if documents is None:
    documents = jnp.zeros((batch, length), jnp.int32)
  keys = jnp.concatenate([state.keys, k], axis=1)
  values = jnp.concatenate([state.values, v], axis=1)
  numbers = jnp.concatenate([cache_numbers(state), documents], axis=1)
  place = jnp.arange(window + length)
  in_blocks = lambda x: fold_chunks(x, block, axis=1).reshape(-1, block, *heads)
  rotated = rotary.rotate_positions(keys, place, config)

  def overlapping(x: jax.Array) -> jax.Array:
    """[B, W + T, ...] -> [B N, W + C, ...]."""
    if length <= window:
      return x
    x = fold_chunks(x, window, axis=1)
    x = jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2)
    return x.reshape(-1, 2 * window, *x.shape[3:])

  numbers = overlapping(numbers)
  ahead = jnp.arange(window + block)[None] - jnp.arange(block)[:, None]
  near = (ahead > 0) & (ahead <= window)
  mask = near[None] & (numbers[:, window:, None] == numbers[:, None])
  y = attend(
    in_blocks(rotary.rotate_positions(q, place[window:], config)),
    overlapping(rotated),
    overlapping(values),
    mask[:, None],
    plain=in_blocks(q),
    persistent=persistent,
  )
  first = jnp.maximum(document_place(state, documents) - length, 0)
  return y.reshape(batch, -1, *heads)[:, :length], dataclasses.replace(
    state, keys=keys[:, length:], values=values[:, length:], first=first
  )


class Attention(nn.Module):
  """Multi-head causal softmax attention."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: AttentionState | None = None,
    documents: jax.Array | None = None,
  ) -> MixerOutput:
    cfg = self.config
    batch, length, _ = x_BTD.shape
    projected, conv = layers.projections(
      x_BTD,
      widths(cfg),
      cfg,
      state.conv if state else None,
      documents,
    )
    heads = (batch, length, -1, cfg.head_dim)
    q, k, v = (
      projected[name].reshape(heads) for name in ("query", "key", "value")
    )
    persistent = PersistentTokens(cfg, name="persistent")()
    is_short = not 0 < cfg.attention_window < length and persistent is None
    with jax.named_scope("scores"):
      if state is None and is_short:
        y = full_pass(q, k, v, documents, cfg)
      else:
        extend = full_extend
        if cfg.attention_window:
          extend = functools.partial(window_extend, persistent=persistent)
        before = state or init_state(cfg, batch)
        y, after = extend(Heads(q, k, v), documents, before, cfg)
        if state is not None:
          state = dataclasses.replace(after, conv=conv)
    y_BTD = layers.dense(
      cfg.width, cfg, ("heads", "embed"), "output", is_output=True
    )(y.reshape(x_BTD.shape))
    group = cfg.num_heads // cfg.kv_heads
    keys, values = (x.repeat(group, 2).reshape(x_BTD.shape) for x in (k, v))
    return MixerOutput(y_BTD, keys, values, state)


def describe(config: ModelConfig) -> list[Problem]:
  """See `models/interface.py`."""
  context = f"tokens so far, at most {config.context_length:,}"
  if config.attention_window:
    context = f"last {config.attention_window:,} tokens"
  return [problems.attention(context)]
