"""CMS levels that learn from the model's own next-token loss (section 3.3).

With D the fast difference of a level's block per sequence, C the shortest chunk
length, C_l the level's, after every C_l tokens

  D_l <- alpha^C_l D_l - eta_l clip(mean over the chunk of dL_t / dD_l)

L_t is the cross entropy of token t + 1, differentiated through all layers
above.  The chunk's last target is the first token of the next one: the update
is made on its receipt, before it is read.  So a state holds, beside what the
model remembers, the pending chunk's tokens, the residual stream that the first
learning level read, and what the sequence layers above it remembered at the
chunk's start: from there the chunk is computed once more for its gradient, and
nothing below is differentiated twice.  Slower
levels add up the gradients of several chunks of C tokens, each at the weights
that it was read with.

The outer gradient goes through the inner one (`outer_order` 2) or takes it for
a constant (1).  Levels learn in the last layers only (`learning_layers`).  A
document that begins inside a chunk reads W_0 there and learns from the next
chunk on.  The nearest public reading is TTT-E2E (2512.23675); the paper does
not say how it trains this signal.

Legend: B batch, T tokens, C shortest chunk length, L layers, K learning layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from hope_jax.memory import chunks
from hope_jax.memory.cms import LevelWeights
from hope_jax.model_config import ModelConfig
from hope_jax.models import cms as cms_layer
from hope_jax.models.block import BlockState
from pallas_kernels.scan import checkpointed_scan

Apply = Callable[..., Any]  # (tokens, state, segments) -> ModelOutput
Finish = Callable[..., Any]  # (stream, levels, mixer, segments) -> logits


class Level(NamedTuple):
  """D and the sum of the current chunk's gradients (None: the shortest chunk
  has no more than one), each LevelWeights with axes [K, B] first."""

  weight: LevelWeights
  gradient: LevelWeights | None


@flax.struct.dataclass
class NextTokenState:
  """What is kept of a sequence.

  Attributes:
    mixer: the sequence layers' fast state, L first.
    start: that of the last K - 1 layers before the pending chunk; None: K is 1.
    levels: `Level` by name.
    tokens: [B, C] the pending chunk; `pending` of them are there.
    stream: [1, B, C, D] what the first learning layer's levels read of it.
    position: tokens that were learned from since the slowest chunk began.
    document, first_document: [B] numbers of the last token's document, and of
      the one that the pending chunk began with; begins: whether it began there.
  """

  mixer: Any
  start: Any
  levels: dict[str, Level]
  tokens: jax.Array
  stream: jax.Array
  pending: jax.Array
  position: jax.Array
  document: jax.Array
  first_document: jax.Array
  begins: jax.Array


def is_on(config: ModelConfig) -> bool:
  """Whether any level of the model learns so."""
  return config.cms.signal == "next_token" and any(
    config.is_live(name) for name in _names(config)
  )


def init_state(
  config: ModelConfig, mixer: Any, batch_size: int
) -> NextTokenState:
  """Before the first token; `mixer`: the sequence layers' state, L first."""
  length, width = config.cms.fast_lengths[0], config.width
  count, levels = learning_layers(config), {}
  for i, name in enumerate(_names(config)):
    hidden = cms_layer.block_hidden(config, i)
    shapes = (width, hidden), (width, hidden), (hidden, width)
    zero = LevelWeights(*(jnp.zeros((count, batch_size, *s)) for s in shapes))
    levels[name] = Level(zero, zero if i else None)
  number, none = jnp.zeros((), jnp.int32), jnp.zeros(batch_size, jnp.int32)
  tokens = jnp.zeros((batch_size, length), jnp.int32)
  return NextTokenState(
    mixer=mixer,
    start=_above(mixer, config),
    levels=levels,
    tokens=tokens,
    stream=jnp.zeros((1, *tokens.shape, width), jnp.dtype(config.dtype)),
    pending=number,
    position=number,
    document=none,
    first_document=none,
    begins=none,
  )


def learning_layers(config: ModelConfig) -> int:
  """How many layers, from the last one down, learn."""
  return max(1, round(config.cms.learning_share * config.num_layers))


def _above(mixer: Any, config: ModelConfig) -> Any:
  """The part of the last K - 1 layers, above the first level that learns."""
  count = learning_layers(config) - 1
  return jax.tree.map(lambda x: x[-count:], mixer) if count else None


def forward(
  apply: Apply,
  finish: Finish,
  params: Any,
  tokens: jax.Array,
  *,
  config: ModelConfig,
  state: NextTokenState,
  segments: jax.Array | None,
) -> tuple[jax.Array, NextTokenState]:
  """Reads `tokens` [B, T] on from `state`: (logits [B, T, V], state).

  They must begin at a chunk's border, or lie inside one chunk.

  Args:
    apply: the model with given D: (tokens, `BlockState`, segments) -> output.
    finish: its last part, `language_model.finish`.
    segments: [B, T] document numbers, 0: the state's document.
  """
  length, total = config.cms.fast_lengths[0], tokens.shape[1]
  whole = total // length * length
  numbers = None
  if segments is not None:
    numbers = segments + state.document[:, None]

  def step(state: NextTokenState, xs: Any) -> tuple[NextTokenState, jax.Array]:
    tokens, numbers = xs
    state = jax.lax.cond(
      state.pending == length,
      lambda state: learn(finish, params, state, xs, config),
      lambda state: state,
      state,
    )
    return read(apply, state, tokens, numbers, config)

  def split(x: jax.Array) -> jax.Array:
    x = x[:, :whole].reshape(x.shape[0], -1, length)
    return x.swapaxes(0, 1)

  logits = []
  if whole:
    state, parts = checkpointed_scan(
      step,
      state,
      jax.tree.map(split, (tokens, numbers)),
      policy=config.memory.remat,
    )
    parts = parts.swapaxes(0, 1)
    logits.append(parts.reshape(parts.shape[0], whole, -1))
  if whole < total:
    rest = jax.tree.map(lambda x: x[:, whole:], (tokens, numbers))
    state, part = step(state, rest)
    logits.append(part)
  return jnp.concatenate(logits, axis=1), state


def read(
  apply: Apply,
  state: NextTokenState,
  tokens: jax.Array,
  numbers: jax.Array | None,
  config: ModelConfig,
) -> tuple[NextTokenState, jax.Array]:
  """Tokens [B, T] of one chunk, at the weights that it began with."""
  is_first = state.pending == 0
  first, begins, segments = state.first_document, state.begins, None
  if numbers is not None:
    first = jnp.where(is_first, numbers[:, 0], first)
    is_new = numbers[:, 0] != state.document
    begins = jnp.where(is_first, is_new.astype(jnp.int32), begins)
    segments = numbers - state.document[:, None]
  weights = {name: level.weight for name, level in state.levels.items()}
  inherits = None if numbers is None else numbers == first[:, None]
  fast = blocks(state.mixer, weights, inherits, config)
  output = apply(tokens, fast, segments)
  insert = jax.lax.dynamic_update_slice_in_dim
  first_layer = config.num_layers - learning_layers(config)
  stream = output.state.cms[first_layer][None]
  state = dataclasses.replace(
    state,
    mixer=output.state.mixer,
    start=chunks.where(is_first, _above(state.mixer, config), state.start),
    tokens=insert(state.tokens, tokens, state.pending, axis=1),
    stream=insert(state.stream, stream, state.pending, axis=2),
    pending=state.pending + tokens.shape[1],
    document=state.document if numbers is None else numbers[:, -1],
    first_document=first,
    begins=begins,
  )
  return state, output.logits


def learn(
  finish: Finish,
  params: Any,
  state: NextTokenState,
  xs: tuple[jax.Array, jax.Array | None],
  config: ModelConfig,
) -> NextTokenState:
  """The update by the full pending chunk, on receipt of what follows it.

  Args:
    xs: tokens [B, T] that follow, and their documents' numbers.
  """
  tokens, numbers = xs
  targets = jnp.concatenate([state.tokens[:, 1:], tokens[:, :1]], axis=1)
  segments = None
  if numbers is not None:  # a chunk of several documents teaches nothing
    segments = jnp.broadcast_to(state.begins[:, None], targets.shape)

  def loss(weights: dict[str, LevelWeights]) -> jax.Array:
    levels = {n: cms_layer.GivenState(w, None) for n, w in weights.items()}
    logits = finish(state.stream[0], levels, state.start, segments)
    return jnp.sum(
      jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits, targets), axis=1
      )
    )

  weights = {name: level.weight for name, level in state.levels.items()}
  gradients = jax.grad(loss)(weights)
  if config.cms.outer_order == 1:
    gradients = jax.lax.stop_gradient(gradients)
  position = state.position + targets.shape[1]
  levels, slower = {}, None
  for i, name in reversed(list(enumerate(state.levels))):
    chunk_length = config.cms.fast_lengths[i]
    is_due = position % chunk_length == 0
    if config.is_live(name):
      levels[name] = update(
        state.levels[name],
        gradients[name],
        rates(params, config, i),
        is_due,
        chunk_length=chunk_length,
        parts=chunk_length // targets.shape[1],
        error_clip=config.cms.error_clip,
      )
      if slower is not None and config.cms.connection == "nested":
        weight = chunks.where(slower[1], slower[0], levels[name].weight)
        levels[name] = levels[name]._replace(weight=weight)
    else:
      levels[name] = state.levels[name]
    slower = levels[name].weight, is_due
  if numbers is not None:
    is_other = numbers[:, 0] != state.first_document
    forget = lambda x: jnp.where(
      is_other.reshape(1, -1, *(1,) * (x.ndim - 2)), 0, x
    )
    levels = jax.tree.map(forget, levels)
  return dataclasses.replace(
    state,
    levels={name: levels[name] for name in state.levels},
    pending=jnp.zeros_like(state.pending),
    position=position % config.cms.fast_lengths[-1],
  )


def update(
  level: Level,
  gradient: LevelWeights,
  rates: tuple[jax.Array, jax.Array | None],
  is_due: jax.Array,
  *,
  chunk_length: int,
  parts: int,
  error_clip: float,
) -> Level:
  """One level after a chunk of the shortest level.

  Args:
    gradient: of that chunk's mean loss.
    rates: eta and log alpha (None: nothing is forgotten), [K] each.
    is_due: whether the level's own chunk, of so many `parts`, is over.
    error_clip: largest norm of a sequence's gradient, over all layers.
  """
  total, rest = gradient, level.gradient
  if rest is not None:
    total = jax.tree.map(jnp.add, rest, gradient)
    rest = jax.tree.map(lambda x: jnp.where(is_due, 0, x), total)
  mean = jax.tree.map(lambda x: x / parts, total)
  if error_clip:
    square = sum(jnp.sum(jnp.square(x), axis=(0, 2, 3)) for x in mean)
    bound = error_clip * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
    scale = jnp.minimum(1.0, bound)[None, :, None, None]
    mean = jax.tree.map(lambda x: x * scale, mean)
  learn_rate, log_retention = rates
  kept = jnp.ones_like(learn_rate)
  if log_retention is not None:
    kept = jnp.exp(log_retention * chunk_length)
  by_layer = lambda x: x[:, None, None, None]
  weight = jax.tree.map(
    lambda w, g: jnp.where(
      is_due, by_layer(kept) * w - by_layer(learn_rate) * g, w
    ),
    level.weight,
    mean,
  )
  return Level(weight, rest)


def rates(
  params: Any, config: ModelConfig, level: int
) -> tuple[jax.Array, jax.Array | None]:
  """eta and log alpha of a level in every learning layer, [K]."""
  group = params["blocks"]["cms"]
  if config.cms.connection == "nested":
    group, end = group["levels"], f"_{level}"
  else:
    group, end = group[f"level_{level}"], ""
  last = slice(-learning_layers(config), None)
  learn_rate = jax.nn.softplus(group[f"learn_rate{end}"][last])
  if not config.cms.half_life:
    return learn_rate, None
  return learn_rate, -jax.nn.softplus(group[f"forget{end}"][last])


def blocks(
  mixer: Any,
  weights: dict[str, LevelWeights],
  inherits: jax.Array | None,
  config: ModelConfig,
) -> BlockState:
  """The model's state: `mixer`, and D for every layer (0 where none learns).

  `inherits` [B, T]: which places read D, None: all.
  """
  layers = config.num_layers
  missing = layers - learning_layers(config)
  pad = lambda x: jnp.pad(x, ((missing, 0), *((0, 0),) * (x.ndim - 1)))
  if inherits is not None:
    inherits = jnp.broadcast_to(inherits[None], (layers, *inherits.shape))
  cms = {
    name: cms_layer.GivenState(jax.tree.map(pad, weight), inherits)
    for name, weight in weights.items()
  }
  return BlockState(mixer=mixer, cms=cms)


def _names(config: ModelConfig) -> list[str]:
  return [f"cms_{i}" for i in range(len(config.cms.fast_lengths))]
