"""CMS levels that learn from the model's own next-token loss (section 3.3).

With D the fast difference of a level's block per sequence, C the shortest chunk
length, C_l the level's, after every C_l tokens

  D_l <- alpha^C_l D_l - eta_l clip(mean over the chunk of dL_t / dD_l)

L_t is the cross entropy of token t + 1, differentiated through all layers
above; slower levels add up the gradients of several chunks of C tokens, each
taken at the weights with which that chunk was read.  Levels learn in the last K
layers only (`learning_layers`).  Everything below their first CMS, including
the sequence layer of the same block, does not depend on D and reads all tokens
at once.  Only the rest is scanned by chunk, with one forward pass for both the
logits and the gradient.  For K = 1 the rest is one CMS and the logits.

A chunk's last target is the first token of the next chunk.  The update is
therefore made when that token arrives, before it is read.  Until then the state
also stores

  - the tokens of the last chunk,
  - the residual stream that the first learning level read there, and
  - what the sequence layers above it remembered at the chunk's start.

Calls with less than a chunk run the whole model at the weights with which the
chunk began (`_read`); when the next chunk begins, the layers that learn run
again on the whole chunk for its gradient (`_learn`).

The outer gradient goes through the inner one (`outer_order` 2) or treats it as
a constant (1).  A document that begins inside a chunk reads W_0 there and
learns from the next chunk on.  The paper does not say how it trains this
signal; the closest published method is TTT-E2E (2512.23675).

Legend: B batch, T tokens, C shortest chunk length, N chunks, L layers, K
learning layers, V vocab.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.typing import ArrayPytree as Tree

from hope_jax.config import ModelConfig
from hope_jax.memory import chunks, devices
from hope_jax.memory.cms import LevelWeights
from hope_jax.models import cms as cms_layer
from hope_jax.models.fast_state import BlockState
from hope_jax.models.next_token_levels import (
  Level,
  NextTokenState,
  advance,
  layers_above,
  learning_layers,
  weights_of,
)
from pallas_kernels.common.scan import (
  checkpointed_scan,
  merge_chunks,
  split_chunks,
)


class Parts(NamedTuple):
  """The model, whole and in two parts, as functions.

  Attributes:
    apply: (tokens, `BlockState`, documents) -> `ModelOutput`, with given D.
    begin: (tokens, mixer, documents) -> the stream that the first learning
      level reads [B, T, D], and the fast state of the sequence layers below it.
      That state, like `mixer`, has an axis of L - K + 1 layers first, or is
      None.
    top: the parameters of the rest, with an axis of K layers first in "blocks".
    finish: (top, stream, levels, mixer, documents) -> logits [B, T, V] and the
      fast state of the K - 1 sequence layers above.
  """

  apply: Callable[..., Tree]
  begin: Callable[..., Tree]
  top: Tree
  finish: Callable[..., Tree]


def forward(
  parts: Parts,
  tokens: jax.Array,
  *,
  config: ModelConfig,
  state: NextTokenState,
  documents: jax.Array | None,
  is_whole: bool = False,
) -> tuple[jax.Array, NextTokenState | None]:
  """Continues `state` with `tokens` [B, T]: (logits [B, T, V], new state).

  The tokens must begin at a chunk's border, or lie inside one chunk.

  Args:
    documents: [B, T] document numbers; 0 is the state's document.
    is_whole: the tokens are a whole sequence and `state` is the initial one;
      None is returned in place of the new state.
  """
  if is_whole:
    return _read_chunks(parts, tokens, state, documents, config, is_whole=True)
  length = config.cms.fast_lengths[0]
  numbers = _numbers(state, tokens, documents)
  state = jax.lax.cond(
    state.pending == length,
    lambda state: _learn(parts, state, tokens[:, 0], numbers[:, 0], config),
    lambda state: state,
    state,
  )
  if tokens.shape[1] < length:
    return _read(parts, state, tokens, documents, config)
  return _read_chunks(parts, tokens, state, documents, config)


def _numbers(
  state: NextTokenState, tokens: jax.Array, documents: jax.Array | None
) -> jax.Array:
  """[B, T] document numbers of the tokens, in the state's own numbering."""
  numbers = jnp.broadcast_to(state.document[:, None], tokens.shape)
  return numbers if documents is None else numbers + documents


def _read(
  parts: Parts,
  state: NextTokenState,
  tokens: jax.Array,
  documents: jax.Array | None,
  config: ModelConfig,
) -> tuple[jax.Array, NextTokenState]:
  """Reads tokens [B, T] of one chunk, at the weights with which it began."""
  is_first = state.pending == 0
  numbers = _numbers(state, tokens, documents)
  first = jnp.where(is_first, numbers[:, 0], state.first_document)
  begins = _differs(numbers[:, 0], state.document)
  inherits = numbers == first[:, None]
  fast = blocks(state.mixer, weights_of(state.levels), inherits, config)
  output = parts.apply(tokens, fast, documents)
  insert = jax.lax.dynamic_update_slice_in_dim
  before = layers_above(state.mixer, config)
  first_layer = config.num_layers - learning_layers(config)
  stream = output.state.stream[first_layer][None]
  state = dataclasses.replace(
    state,
    mixer=output.state.mixer,
    start=chunks.where(is_first, before, state.start),
    tokens=insert(state.tokens, tokens, state.pending, axis=1),
    stream=insert(state.stream, stream, state.pending, axis=2),
    pending=state.pending + tokens.shape[1],
    document=numbers[:, -1],
    first_document=first,
    begins=jnp.where(is_first, begins, state.begins),
  )
  return output.logits, state


def _differs(a: jax.Array, b: jax.Array) -> jax.Array:
  return (a != b).astype(jnp.int32)


def _learn(
  parts: Parts,
  state: NextTokenState,
  token: jax.Array,
  number: jax.Array,
  config: ModelConfig,
) -> NextTokenState:
  """Updates the levels from the full pending chunk, when its successor arrives.

  Args:
    token: [B], the token after the chunk; number: [B], its document's number.
  """
  targets = jnp.concatenate([state.tokens[:, 1:], token[:, None]], axis=1)
  top = _Top(parts.finish, parts.top, config)
  # The chunk is treated as one document: if there are several, `advance` resets
  # the levels, and nothing is learned from it.
  documents = jnp.broadcast_to(state.begins[:, None], targets.shape)
  gradients, _ = top.gradients(
    weights_of(state.levels),
    _Chunk(state.stream[0], documents),
    state.start,
    targets,
  )
  is_other = number != state.first_document
  levels, position = advance(
    state.levels, gradients, parts.top, state.position, is_other, config=config
  )
  return dataclasses.replace(
    state,
    levels=levels,
    pending=jnp.zeros_like(state.pending),
    position=position,
  )


class _Chunk(NamedTuple):
  """A chunk as input of the learning layers.

  Attributes:
    stream: [B, C, D].
    documents: [B, C] document numbers; 0 is the one that ended the last chunk.
    inherits: [B, C] which places read D.  This and `documents` are None with a
      single document.
  """

  stream: jax.Array
  documents: jax.Array | None = None
  inherits: jax.Array | None = None


class _Top(NamedTuple):
  """The learning layers, from the first one's CMS on, and the logits."""

  finish: Callable[..., Tree]
  params: Tree
  config: ModelConfig

  def read(
    self, weights: dict[str, LevelWeights], chunk: _Chunk, mixer: Tree
  ) -> tuple[jax.Array, Tree]:
    """Logits of a chunk, and the fast state of the layers above after it."""
    inherits = chunk.inherits
    if inherits is not None:
      count = learning_layers(self.config)
      inherits = jnp.broadcast_to(inherits, (count, *inherits.shape))
    levels = {n: cms_layer.GivenLevel(w, inherits) for n, w in weights.items()}
    return self.finish(
      self.params, chunk.stream, levels, mixer, chunk.documents
    )

  def gradients(
    self,
    weights: dict[str, LevelWeights],
    chunk: _Chunk,
    mixer: Tree,
    targets: jax.Array,
  ) -> tuple[dict[str, LevelWeights], tuple[jax.Array, Tree]]:
    """Gradient of a chunk's mean loss for every D, and what `read` returns."""

    def loss(weights: dict[str, LevelWeights]) -> tuple[jax.Array, Tree]:
      logits, after = self.read(weights, chunk, mixer)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
      return jnp.sum(jnp.mean(losses, axis=1)), (logits, after)

    gradients, found = jax.grad(loss, has_aux=True)(weights)
    if self.config.cms.outer_order == 1:
      gradients = jax.lax.stop_gradient(gradients)
    return gradients, found


class _Carry(NamedTuple):
  """The state carried from chunk to chunk; fields as in `NextTokenState`."""

  levels: dict[str, Level]
  mixer: Tree
  position: jax.Array
  document: jax.Array


def _read_chunks(
  parts: Parts,
  tokens: jax.Array,
  state: NextTokenState,
  documents: jax.Array | None,
  config: ModelConfig,
  *,
  is_whole: bool = False,
) -> tuple[jax.Array, NextTokenState | None]:
  """Reads tokens [B, T] that begin at a chunk's border, scanned by chunk."""
  numbers = None if documents is None else _numbers(state, tokens, documents)
  below = None
  if not is_whole:
    count = config.num_layers - learning_layers(config) + 1
    below = jax.tree.map(lambda x: x[:count], state.mixer)
  stream, below = parts.begin(tokens, below, documents)
  scan = functools.partial(
    _scan, parts.finish, config=config, is_whole=is_whole
  )
  carry = _Carry(
    state.levels,
    layers_above(state.mixer, config),
    state.position,
    state.document,
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


def _following(x: jax.Array) -> jax.Array:
  """x [B, n] shifted left by one; the last entry is repeated and not used."""
  return jnp.concatenate([x[:, 1:], x[:, -1:]], axis=1)


def _chunk_of(
  stream: jax.Array, numbers: jax.Array | None, document: jax.Array
) -> _Chunk:
  """A `_Chunk`; `document` [B] is the number that ended the last chunk."""
  if numbers is None:
    return _Chunk(stream)
  inherits = numbers == numbers[:, :1]
  return _Chunk(stream, numbers - document[:, None], inherits)


# With at most this many chunks the last one is compiled separately, without its
# unused update; with more, the saving is not worth the compile time.
_MAX_COUNT_APART = 16


def _scan(
  finish: Callable[..., Tree],
  params: Tree,
  sequence: tuple[jax.Array, jax.Array, jax.Array | None],
  carry: _Carry,
  *,
  config: ModelConfig,
  is_whole: bool,
) -> tuple[jax.Array, _Carry, Tree]:
  """(logits [B, T, V], the carry before the last chunk, the fast state of the
  layers above after it).  The last two are not used if `is_whole`.

  Args:
    sequence: stream [B, T, D], tokens and document numbers [B, T].
  """
  stream, tokens, numbers = sequence
  top = _Top(finish, params, config)
  length, total = config.cms.fast_lengths[0], tokens.shape[1]
  count = -(-total // length)  # the last chunk may be shorter
  is_apart = not is_whole or total % length or count <= _MAX_COUNT_APART
  scanned = count - 1 if is_apart else count

  cut = lambda x: split_chunks(x[:, : scanned * length], length, axis=1)

  def body(carry: _Carry, xs: Tree) -> tuple[_Carry, jax.Array]:
    stream, targets, numbers, next_first = xs
    chunk = _chunk_of(stream, numbers, carry.document)
    gradients, (logits, mixer) = top.gradients(
      weights_of(carry.levels), chunk, carry.mixer, targets
    )
    document, is_other = carry.document, None
    if numbers is not None:
      document = numbers[:, -1]
      is_other = next_first != numbers[:, 0]
    levels, position = advance(
      carry.levels, gradients, params, carry.position, is_other, config=config
    )
    return _Carry(levels, mixer, position, document), logits

  logits, after = [], carry.mixer
  if scanned:
    documents = None, None
    if numbers is not None:
      next_first = _following(numbers[:, ::length])[:, :scanned]
      documents = cut(numbers), next_first.swapaxes(0, 1)
    xs = cut(stream), cut(_following(tokens)), *documents
    with jax.named_scope("next_token"):
      carry, found = checkpointed_scan(
        body, carry, xs, policy=config.memory.remat
      )
    logits.append(merge_chunks(found, scanned * length, axis=1))
  if is_apart:
    begin = scanned * length
    last = None if numbers is None else numbers[:, begin:]
    chunk = _chunk_of(stream[:, begin:], last, carry.document)
    part, after = top.read(weights_of(carry.levels), chunk, carry.mixer)
    logits.append(part)
  return jnp.concatenate(logits, axis=1), carry, after


def blocks(
  mixer: Tree,
  weights: dict[str, LevelWeights],
  inherits: jax.Array,
  config: ModelConfig,
) -> BlockState:
  """The model's state: `mixer`, and D for every layer (0 in those that do not
  learn).

  `inherits` [B, T] says which places read D.
  """
  layers = config.num_layers
  missing = layers - learning_layers(config)
  pad = lambda x: jnp.pad(x, ((missing, 0), *((0, 0),) * (x.ndim - 1)))
  inherits = jnp.broadcast_to(inherits[None], (layers, *inherits.shape))
  given = {
    name: cms_layer.GivenLevel(jax.tree.map(pad, weight), inherits)
    for name, weight in weights.items()
  }
  return BlockState(mixer, {}, given=given)
