"""The one recurrence: fast state scanned over the chunks of a sequence.

Inside a chunk gradients are taken at the state in which the chunk began
(paper 8.2), so a fast level is described by two states: `start`, its weights
at the chunk's first token, and `now`, what the tokens so far made of them.
Training starts at a chunk's border, where both are the same; a session may
stop and go on at any token.

Several documents may follow each other in a sequence (`segments`, their
numbers).  Document 0 is the one that a given state belongs to, so that a piece
that begins with another number begins with a new document.

Legend: B batch, N chunks, C chunk length, T tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from pallas_kernels.common.scan import (
  CheckpointPolicy,
  checkpointed_scan,
  merge_chunks,
  split_chunks,
)


@flax.struct.dataclass
class ChunkState:
  """State of a fast level between two calls.

  Attributes:
    now: {"weight": ..., "momentum": ...}, differences from the learned start.
    start: `now["weight"]` as it was at the current chunk's first token.
    position: tokens of the current chunk that are already written, int32.
      None (and no `start`): pieces are whole chunks, which is cheaper.
  """

  now: dict[str, Any]
  start: Any
  position: jax.Array | None

  def map_weights(self, fn: Callable[[Any], Any]) -> "ChunkState":
    """The same state with other weights."""
    now = {**self.now, "weight": fn(self.now["weight"])}
    start = None if self.start is None else fn(self.start)
    return ChunkState(now, start, self.position)


def zeros(initial: Any, batch_size: int) -> Any:
  """D = 0 for every sequence: [B, *M_0], any tree of M_0."""
  return jax.tree.map(
    lambda w: jnp.zeros((batch_size, *w.shape), w.dtype), initial
  )


def per_sequence(
  initial: Any, batch_size: int, axes: tuple[str | None, ...]
) -> Any:
  """[B, *M_0]: M_0 for a scan over chunks, any tree; `axes`: M_0's first ones.

  The outer gradient of an M_0 that all sequences share would be summed over
  them, and over the devices that hold them, in every chunk; so it is once.
  """

  def copy(weight: jax.Array) -> jax.Array:
    copies = jnp.broadcast_to(weight, (batch_size, *weight.shape))
    return nn.with_logical_constraint(copies, ("batch", *axes))

  return jax.tree.map(copy, initial)


def fresh(
  now: dict[str, Any], chunk_length: int = 0, piece_length: int | None = None
) -> ChunkState:
  """The state at the start of a chunk.

  With a `piece_length`, all pieces to come have so many tokens.
  """
  if piece_length and piece_length % chunk_length == 0:
    return ChunkState(now, None, None)
  return ChunkState(now, now["weight"], jnp.zeros((), jnp.int32))


class Layout(NamedTuple):
  """How T tokens are laid on `count` chunks of `length` tokens.

  `offset` (None: 0) tokens of the first chunk are past; `live` [N, C] says
  which places hold a token, None if all do.
  """

  tokens: int
  count: int
  length: int
  offset: jax.Array | None
  live: jax.Array | None

  def split(self, x: jax.Array, axis: int) -> jax.Array:
    """Cuts axis T into chunks and moves them first: [N, ..., C, ...]."""
    if self.offset is not None:
      widths = [(0, 0)] * x.ndim
      widths[axis] = (0, self.count * self.length - self.tokens)
      x = jnp.roll(jnp.pad(x, widths), self.offset, axis)
    return split_chunks(x, self.length, axis)

  def merge(self, y: jax.Array, axis: int) -> jax.Array:
    """Inverse of `split`."""
    if self.offset is None:
      return merge_chunks(y, self.tokens, axis)
    y = merge_chunks(y, self.count * self.length, axis)
    return jax.lax.dynamic_slice_in_dim(y, self.offset, self.tokens, axis)

  def number(self, segments: jax.Array) -> jax.Array:
    """Document numbers [B, T] of all places: [N, B, C].

    Places before the first token belong to its document, so that a piece may
    begin with a new one wherever it begins; those after the last to its.
    """
    first = 0 if self.offset is None else self.offset
    token = jnp.arange(self.count * self.length) - first
    numbers = jnp.take(segments, jnp.clip(token, 0, self.tokens - 1), axis=1)
    return split_chunks(numbers, self.length, 1)


def plan(tokens: int, chunk_length: int, state: ChunkState | None) -> Layout:
  """Lays `tokens` on chunks; a state's position need not be a border."""
  at_border = state is not None and state.position is None
  if at_border and tokens % chunk_length:
    raise ValueError(
      f"{tokens} tokens are not whole chunks of {chunk_length}, which the"
      " state was made for"
    )
  if state is not None and not at_border and tokens == 1:
    return Layout(1, 1, 1, None, None)
  offset = None if state is None else state.position
  spare = 0 if offset is None else chunk_length - 1
  length = min(chunk_length, tokens) if state is None else chunk_length
  count = -(-(tokens + spare) // length)
  live = None
  if count * length != tokens:
    place = jnp.arange(count * length).reshape(count, length)
    first = 0 if offset is None else offset
    live = (place >= first) & (place < first + tokens)
  return Layout(tokens, count, length, offset, live)


class Documents(NamedTuple):
  """Where documents begin and end, and the state to begin one with.

  begins [N, B]: chunk n begins with another document than chunk n-1 ended
  with.  inherits, keeps [N, B, C]: a place's document is the one at the chunk's
  first place (it may read what earlier chunks wrote), at its last place (what
  it writes is for the next chunk).
  """

  begins: jax.Array
  inherits: jax.Array
  keeps: jax.Array
  origin: dict[str, Any]


def documents(
  segments: jax.Array | None, layout: Layout, origin: dict[str, Any]
) -> Documents | None:
  """`segments` [B, T] as seen by chunks; None without.

  Only levels that mask (the CMS) allow a document to begin inside a chunk; for
  the others documents must begin on a chunk's border (spec 02, packing).
  """
  if segments is None:
    return None
  number = layout.number(segments)
  first, last = number[..., :1], number[..., -1:]
  before = jnp.pad(last[:-1], ((1, 0), (0, 0), (0, 0)))
  return Documents(
    begins=(first != before)[..., 0],
    inherits=number == first,
    keeps=number == last,
    origin=origin,
  )


def choose(condition_B: jax.Array, a: Any, b: Any) -> Any:
  """Per sequence `a` where the condition holds, else `b`."""

  def pick(x, y):
    return jnp.where(condition_B.reshape(-1, *(1,) * (x.ndim - 1)), x, y)

  return jax.tree.map(pick, a, b)


def scan_chunks(
  step: Callable,
  state: ChunkState,
  xs: Any,
  layout: Layout,
  *,
  chunk_length: int,
  policy: CheckpointPolicy,
  continued: bool,
  docs: Documents | None = None,
) -> tuple[Any, ChunkState | None]:
  """Runs `now, y = step(start, now, x, live)` over the chunks.

  Args:
    xs: inputs with chunks first (`Layout.split`).
    continued: whether a new state is wanted; else nothing is returned for it.
    docs: from `documents`.
  """
  # Per chunk: a new document begins it; its first document also ends it.
  borders = None if docs is None else (docs.begins, docs.keeps[..., 0])
  inputs = (xs, layout.live, borders)

  def restart(now, borders):
    if docs is None:
      return now
    return choose(borders[0], docs.origin, now)

  if not continued or state.position is None:

    def body(now, inputs):
      x, live, borders = inputs
      now = restart(now, borders)
      return step(now["weight"], now, x, live)

    if not continued:
      return _outputs(body, state.now, inputs, layout.count, policy), None
    now, ys = checkpointed_scan(body, state.now, inputs, policy=policy)
    return ys, ChunkState(now, None, None)

  first = jnp.arange(layout.count) * layout.length
  end = state.position + layout.tokens
  is_next = (first > 0) & (first < end)

  def body_continued(carry, inputs):
    start, now = carry
    is_next, (x, live, borders) = inputs
    now = restart(now, borders)
    start = where(is_next, now["weight"], start)
    if docs is not None:
      start = choose(borders[0], now["weight"], start)
    now, y = step(start, now, x, live)
    if docs is not None:
      start = choose(borders[1], start, docs.origin["weight"])
    return (start, now), y

  (start, now), ys = checkpointed_scan(
    body_continued, (state.start, state.now), (is_next, inputs), policy=policy
  )
  position = end % chunk_length
  start = where(position == 0, now["weight"], start)
  return ys, ChunkState(now, start, position.astype(jnp.int32))


# Up to so many chunks the last one is compiled apart: beyond, its write is too
# small a part to pay for that.
_MAX_COUNT_APART = 16


def _outputs(
  body: Callable, now: Any, xs: Any, count: int, policy: CheckpointPolicy
) -> Any:
  """What `body` returns for every chunk, without the last state.

  Nothing reads what the last chunk writes, so that it runs after the scan,
  where the compiler drops the write and its gradient.
  """
  if count > _MAX_COUNT_APART:
    return checkpointed_scan(body, now, xs, policy=policy)[1]
  last = jax.tree.map(lambda x: x[-1], xs)
  if count == 1:
    _, y = jax.checkpoint(body)(now, last)
    return jax.tree.map(lambda y: y[None], y)
  earlier = jax.tree.map(lambda x: x[:-1], xs)
  now, ys = checkpointed_scan(body, now, earlier, policy=policy)
  _, y = jax.checkpoint(body)(now, last)
  return jax.tree.map(lambda ys, y: jnp.concatenate([ys, y[None]]), ys, y)


def where(condition: jax.Array, a: Any, b: Any) -> Any:
  """The tree `a` where one condition for all holds, else `b`."""
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
