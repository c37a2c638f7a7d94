"""The one recurrence: fast state scanned over the chunks of a sequence.

Inside a chunk gradients are taken at the state in which the chunk began
(paper 8.2), so a fast level is described by two states: `start`, its weights
at the chunk's first token, and `now`, what the tokens so far made of them.
Training starts at a chunk's border, where both are the same; a session may
stop and go on at any token.

Legend: N chunks, C chunk length, T tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from pallas_kernels.scan import (
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
  """

  now: dict[str, Any]
  start: Any
  position: jax.Array

  def with_weights(self, now_weight: Any, start: Any) -> "ChunkState":
    """The same state with other weights."""
    return ChunkState({**self.now, "weight": now_weight}, start, self.position)


def zeros(initial: Any, batch_size: int) -> Any:
  """D = 0 for every sequence: [B, *M_0], any tree of M_0."""
  return jax.tree.map(
    lambda w: jnp.zeros((batch_size, *w.shape), w.dtype), initial
  )


def fresh(now: dict[str, Any]) -> ChunkState:
  """The state at the start of a chunk."""
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


def plan(tokens: int, chunk_length: int, state: ChunkState | None) -> Layout:
  """Lays `tokens` on chunks; a state's position need not be a border."""
  if state is not None and tokens == 1:
    return Layout(1, 1, 1, None, None)
  offset = None if state is None else state.position
  spare = 0 if state is None else chunk_length - 1
  length = min(chunk_length, tokens) if state is None else chunk_length
  count = -(-(tokens + spare) // length)
  live = None
  if count * length != tokens:
    place = jnp.arange(count * length).reshape(count, length)
    first = 0 if offset is None else offset
    live = (place >= first) & (place < first + tokens)
  return Layout(tokens, count, length, offset, live)


def scan_chunks(
  step: Callable,
  state: ChunkState,
  xs: Any,
  layout: Layout,
  *,
  chunk_length: int,
  policy: CheckpointPolicy,
  continued: bool,
  resets: tuple[jax.Array, dict[str, Any]] | None = None,
) -> tuple[Any, ChunkState | None]:
  """Runs `now, y = step(start, now, x, live)` over the chunks.

  Args:
    xs: inputs with chunks first (`Layout.split`).
    continued: whether `state` may lie inside a chunk and a new state is
      wanted; else `now` is also the first chunk's start, only `now` is
      carried, and no state is returned.
    resets: ([N, B] flags: a new document begins at this chunk, the state to
      begin with).
  """
  inputs = (xs, layout.live, resets[0] if resets else None)

  def restart(now, reset_B):
    if reset_B is None:
      return now
    assert resets is not None
    return jax.tree.map(
      lambda a, b: jnp.where(reset_B.reshape(-1, *(1,) * (a.ndim - 1)), b, a),
      now,
      resets[1],
    )

  if not continued:

    def body(now, inputs):
      x, live, reset_B = inputs
      now = restart(now, reset_B)
      return step(now["weight"], now, x, live)

    return _outputs(body, state.now, inputs, layout.count, policy), None

  first = jnp.arange(layout.count) * layout.length
  end = state.position + layout.tokens
  begins = (first > 0) & (first < end)

  def body_continued(carry, inputs):
    start, now = carry
    begins, (x, live, reset_B) = inputs
    now = restart(now, reset_B)
    start = _where(begins, now["weight"], start)
    now, y = step(start, now, x, live)
    return (start, now), y

  (start, now), ys = checkpointed_scan(
    body_continued, (state.start, state.now), (begins, inputs), policy=policy
  )
  position = end % chunk_length
  start = _where(position == 0, now["weight"], start)
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


def _where(condition: jax.Array, a: Any, b: Any) -> Any:
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def chunk_resets(
  segments: jax.Array | None, layout: Layout
) -> jax.Array | None:
  """[N, B]: chunk n begins with another document than chunk n-1 ended with.

  Documents must begin on a chunk's border (spec 02, packing).
  """
  if segments is None:
    return None
  before = jnp.pad(segments, ((0, 0), (1, 0)), mode="edge")[:, :-1]
  return layout.split(segments != before, axis=1)[..., 0]
