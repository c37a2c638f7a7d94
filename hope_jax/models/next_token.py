"""CMS levels that learn from the model's own next-token loss (section 3.3).

With D the fast difference of a level's block per sequence, C the shortest chunk
length, C_l the level's, after every C_l tokens

  D_l <- alpha^C_l D_l - eta_l clip(mean over the chunk of dL_t / dD_l)

L_t is the cross entropy of token t + 1, differentiated through all layers
above; slower levels add up the gradients of several chunks of C tokens, each at
the weights that it was read with.  Levels learn in the last K layers only
(`learning_layers`).  What lies below, the sequence layer of the first of these
K included, does not depend on D: it reads all tokens at once, and only the rest
is scanned by chunk, where one forward pass gives the logits and the gradient.
For K = 1 that is an FFN and the logits.

A chunk's last target is the first token of the next one: the update is made on
its receipt, before it is read.  So the state holds, beside what the model
remembers, the tokens of the last chunk, the residual stream that the first
learning level read there, and what the sequence layers above it remembered at
the chunk's start.  A piece of text inside a chunk is read at that chunk's
weights by the whole model (`_read`), and the chunk is computed once more for
its gradient when the next one begins (`_learn`).

The outer gradient goes through the inner one (`outer_order` 2) or takes it for
a constant (1).  A document that begins inside a chunk reads W_0 there and
learns from the next chunk on.  The nearest public reading is TTT-E2E
(2512.23675); the paper does not say how it trains this signal.

Legend: B batch, T tokens, C shortest chunk length, N chunks, L layers, K
learning layers, V vocab.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from hope_jax.memory import chunks, devices
from hope_jax.memory.cms import LevelWeights
from hope_jax.model_config import ModelConfig
from hope_jax.models import cms as cms_layer
from hope_jax.models.block import BlockState
from pallas_kernels.scan import checkpointed_scan


class Parts(NamedTuple):
  """The model, whole and in two parts, as functions.

  Attributes:
    apply: (tokens, `BlockState`, segments) -> `ModelOutput`, with given D.
    begin: (tokens, mixer, segments) -> the stream that the first learning
      level reads [B, T, D], and the fast state of the sequence layers up to
      there, both as given: L - K + 1 layers first, or None.
    top: the parameters of the rest, K layers first in "blocks".
    finish: (top, stream, levels, mixer, segments) -> logits [B, T, V] and the
      fast state of the K - 1 sequence layers above.
  """

  apply: Callable[..., Any]
  begin: Callable[..., Any]
  top: Any
  finish: Callable[..., Any]


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
  parts: Parts,
  tokens: jax.Array,
  *,
  config: ModelConfig,
  state: NextTokenState,
  segments: jax.Array | None,
  is_whole: bool = False,
) -> tuple[jax.Array, NextTokenState | None]:
  """Reads `tokens` [B, T] on from `state`: (logits [B, T, V], state).

  They must begin at a chunk's border, or lie inside one chunk.

  Args:
    segments: [B, T] document numbers, 0: the state's document.
    is_whole: the tokens are a whole sequence, `state` is the one before it, and
      None is returned in place of the state after it.
  """
  if is_whole:
    return _read_chunks(parts, tokens, state, segments, config, is_whole=True)
  numbers = None
  if segments is not None:
    numbers = segments + state.document[:, None]
  length = config.cms.fast_lengths[0]
  state = jax.lax.cond(
    state.pending == length,
    lambda state: _learn(parts, state, (tokens, numbers), config),
    lambda state: state,
    state,
  )
  if tokens.shape[1] < length:
    return _read(parts, state, tokens, numbers, config)
  return _read_chunks(parts, tokens, state, segments, config)


def _read(
  parts: Parts,
  state: NextTokenState,
  tokens: jax.Array,
  numbers: jax.Array | None,
  config: ModelConfig,
) -> tuple[jax.Array, NextTokenState]:
  """Tokens [B, T] of one chunk, at the weights that it began with."""
  is_first = state.pending == 0
  begins, first = jnp.zeros_like(state.document), state.document
  inherits = segments = None
  if numbers is not None:
    first, begins = numbers[:, 0], _differs(numbers[:, 0], state.document)
  first = jnp.where(is_first, first, state.first_document)
  begins = jnp.where(is_first, begins, state.begins)
  if numbers is not None:
    segments = numbers - state.document[:, None]
    inherits = numbers == first[:, None]
  fast = blocks(state.mixer, _weights(state.levels), inherits, config)
  output = parts.apply(tokens, fast, segments)
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
  return output.logits, state


def _differs(a: jax.Array, b: jax.Array) -> jax.Array:
  return (a != b).astype(jnp.int32)


def _weights(levels: dict[str, Level]) -> dict[str, LevelWeights]:
  return {name: level.weight for name, level in levels.items()}


def _learn(
  parts: Parts,
  state: NextTokenState,
  following: tuple[jax.Array, jax.Array | None],
  config: ModelConfig,
) -> NextTokenState:
  """The update by the full pending chunk, on receipt of what follows it.

  Args:
    following: tokens [B, T] that follow, and their documents' numbers.
  """
  tokens, numbers = following
  targets = jnp.concatenate([state.tokens[:, 1:], tokens[:, :1]], axis=1)
  segments = is_other = None
  if numbers is not None:  # a chunk of several documents teaches nothing
    segments = jnp.broadcast_to(state.begins[:, None], targets.shape)
    is_other = numbers[:, 0] != state.first_document
  top = _Top(parts.finish, parts.top, config)
  chunk = _Chunk(state.stream[0], segments)
  weights = _weights(state.levels)
  gradients, _ = top.gradients(weights, chunk, state.start, targets)
  levels, position = _advance(
    state.levels, gradients, parts.top, state.position, is_other, config
  )
  return dataclasses.replace(
    state,
    levels=levels,
    pending=jnp.zeros_like(state.pending),
    position=position,
  )


class _Chunk(NamedTuple):
  """What the learning layers read of a chunk.

  Attributes:
    stream: [B, C, D].
    segments: [B, C] document numbers, 0: the one that ended the last chunk.
    inherits: [B, C] which places read D.  Both are None where there is one
      document only.
  """

  stream: jax.Array
  segments: jax.Array | None = None
  inherits: jax.Array | None = None


class _Top(NamedTuple):
  """The learning layers, from the first one's levels on."""

  finish: Callable[..., Any]
  params: Any
  config: ModelConfig

  def read(
    self, weights: dict[str, LevelWeights], chunk: _Chunk, mixer: Any
  ) -> tuple[jax.Array, Any]:
    """Logits of a chunk, and the fast state of the layers above after it."""
    inherits = chunk.inherits
    if inherits is not None:
      count = learning_layers(self.config)
      inherits = jnp.broadcast_to(inherits, (count, *inherits.shape))
    levels = {n: cms_layer.GivenState(w, inherits) for n, w in weights.items()}
    return self.finish(self.params, chunk.stream, levels, mixer, chunk.segments)

  def gradients(
    self,
    weights: dict[str, LevelWeights],
    chunk: _Chunk,
    mixer: Any,
    targets: jax.Array,
  ) -> tuple[dict[str, LevelWeights], tuple[jax.Array, Any]]:
    """The mean loss of a chunk by every D; what `read` returns for it."""

    def loss(weights: dict[str, LevelWeights]) -> tuple[jax.Array, Any]:
      logits, after = self.read(weights, chunk, mixer)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
      return jnp.sum(jnp.mean(losses, axis=1)), (logits, after)

    gradients, found = jax.grad(loss, has_aux=True)(weights)
    if self.config.cms.outer_order == 1:
      gradients = jax.lax.stop_gradient(gradients)
    return gradients, found


def _advance(
  levels: dict[str, Level],
  gradients: dict[str, LevelWeights],
  params: Any,
  position: jax.Array,
  is_other: jax.Array | None,
  config: ModelConfig,
) -> tuple[dict[str, Level], jax.Array]:
  """All levels, and the position, after a chunk of the shortest one.

  Args:
    is_other: [B] whether what follows is of another document than the one that
      the chunk began with: then all is forgotten.
  """
  length = config.cms.fast_lengths[0]
  position = position + length
  new, slower = {}, None
  for i, name in reversed(list(enumerate(levels))):
    chunk_length = config.cms.fast_lengths[i]
    is_due = position % chunk_length == 0
    new[name] = levels[name]
    if config.is_live(name):
      new[name] = update(
        levels[name],
        gradients[name],
        rates(params, config, i),
        is_due,
        chunk_length=chunk_length,
        parts=chunk_length // length,
        error_clip=config.cms.error_clip,
      )
      if slower is not None and config.cms.connection == "nested":
        weight = chunks.where(slower[1], slower[0], new[name].weight)
        new[name] = new[name]._replace(weight=weight)
    slower = new[name].weight, is_due
  if is_other is not None:
    forget = lambda x: jnp.where(
      is_other.reshape(1, -1, *(1,) * (x.ndim - 2)), 0, x
    )
    new = jax.tree.map(forget, new)
  new = {name: new[name] for name in levels}
  return new, position % config.cms.fast_lengths[-1]


class _Carry(NamedTuple):
  """What is handed from chunk to chunk; fields as in `NextTokenState`."""

  levels: dict[str, Level]
  mixer: Any
  position: jax.Array
  document: jax.Array


def _read_chunks(
  parts: Parts,
  tokens: jax.Array,
  state: NextTokenState,
  segments: jax.Array | None,
  config: ModelConfig,
  *,
  is_whole: bool = False,
) -> tuple[jax.Array, NextTokenState | None]:
  """Tokens [B, T] from a chunk's border on, all that is below D at once."""
  numbers = below = None
  if segments is not None:
    numbers = segments + state.document[:, None]
  if not is_whole:
    count = config.num_layers - learning_layers(config) + 1
    below = jax.tree.map(lambda x: x[:count], state.mixer)
  stream, below = parts.begin(tokens, below, segments)
  scan = functools.partial(
    _scan, parts.finish, config=config, wants_state=not is_whole
  )
  carry = _Carry(
    state.levels, _above(state.mixer, config), state.position, state.document
  )
  run = devices.by_rows(scan, lambda rows, state: (rows, state, state.mixer))
  logits, carry, above = run(parts.top, (stream, tokens, numbers), carry)
  if is_whole:
    return logits, None
  length = config.cms.fast_lengths[0]
  rest = (tokens.shape[1] - 1) % length + 1
  fill = lambda x: jnp.pad(
    x[:, -rest:], ((0, 0), (0, length - rest), *((0, 0),) * (x.ndim - 2))
  )
  document, begins = carry.document, jnp.zeros_like(carry.document)
  if numbers is not None:
    document = numbers[:, -rest]
    begins = _differs(document, carry.document)
  join = lambda *layers: jnp.concatenate(layers)
  return logits, NextTokenState(
    mixer=below if above is None else jax.tree.map(join, below, above),
    start=carry.mixer,
    levels=carry.levels,
    tokens=fill(tokens),
    stream=fill(stream)[None],
    pending=jnp.asarray(rest, jnp.int32),
    position=carry.position,
    document=document if numbers is None else numbers[:, -1],
    first_document=document,
    begins=begins,
  )


# Up to so many chunks the last one is compiled apart, without an update that
# nothing reads: beyond, that is too small a part to pay for it.
_MAX_COUNT_APART = 16


def _scan(
  finish: Callable[..., Any],
  params: Any,
  sequence: tuple[jax.Array, jax.Array, jax.Array | None],
  carry: _Carry,
  *,
  config: ModelConfig,
  wants_state: bool,
) -> tuple[jax.Array, _Carry, Any]:
  """(logits [B, T, V], what the last chunk began with, the fast state of the
  layers above after it).

  Args:
    sequence: stream [B, T, D], tokens and document numbers [B, T].
  """
  stream, tokens, numbers = sequence
  top = _Top(finish, params, config)
  length, total = config.cms.fast_lengths[0], tokens.shape[1]
  count = -(-total // length)  # the last one may be shorter
  is_apart = wants_state or total % length or count <= _MAX_COUNT_APART
  scanned = count - 1 if is_apart else count

  def cut(x: jax.Array) -> jax.Array:
    """The chunks that are scanned, [N, B, C, ...]."""
    x = x[:, : scanned * length]
    return x.reshape(x.shape[0], -1, length, *x.shape[2:]).swapaxes(0, 1)

  def following(x: jax.Array) -> jax.Array:
    """What follows each of [B, n]; the last one, which is not used, itself."""
    return jnp.concatenate([x[:, 1:], x[:, -1:]], axis=1)

  def chunk_of(stream, numbers, document) -> _Chunk:
    if numbers is None:
      return _Chunk(stream)
    return _Chunk(
      stream, numbers - document[:, None], numbers == numbers[:, :1]
    )

  def body(carry: _Carry, xs: Any) -> tuple[_Carry, jax.Array]:
    stream, targets, numbers, next_first = xs
    chunk = chunk_of(stream, numbers, carry.document)
    gradients, (logits, mixer) = top.gradients(
      _weights(carry.levels), chunk, carry.mixer, targets
    )
    document, is_other = carry.document, None
    if numbers is not None:
      document = numbers[:, -1]
      is_other = next_first != numbers[:, 0]
    levels, position = _advance(
      carry.levels, gradients, params, carry.position, is_other, config
    )
    return _Carry(levels, mixer, position, document), logits

  logits, after = [], carry.mixer
  if scanned:
    documents = None, None
    if numbers is not None:
      next_first = following(numbers[:, ::length])[:, :scanned]
      documents = cut(numbers), next_first.swapaxes(0, 1)
    xs = cut(stream), cut(following(tokens)), *documents
    with jax.named_scope("next_token"):
      carry, found = checkpointed_scan(
        body, carry, xs, policy=config.memory.remat
      )
    found = found.swapaxes(0, 1)
    logits.append(found.reshape(found.shape[0], -1, found.shape[-1]))
  if is_apart:
    begin = scanned * length
    last = None if numbers is None else numbers[:, begin:]
    chunk = chunk_of(stream[:, begin:], last, carry.document)
    part, after = top.read(_weights(carry.levels), chunk, carry.mixer)
    logits.append(part)
  return jnp.concatenate(logits, axis=1), carry, after


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
