"""The recurrence of all memories: fast state scanned over a sequence's chunks.

Inside a chunk gradients are taken at the state in which the chunk began
(paper 8.2), so a fast level is described by two states: `start`, its weights
at the chunk's first token, and `now`, its state after the tokens so far.
Training starts at a chunk's border, where both are the same; a session may
stop and continue at any token.

Several documents may follow each other in a sequence; `documents` are their
numbers.  Document 0 is the one that a given state belongs to, so a sequence
whose first number is not 0 begins with a new document.

A memory is a `Memory`, a tuple of pure functions, which `run` applies.

Legend: B batch, N chunks, C chunk length, T tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree

from hope_jax.memory import dynamics
from pallas_kernels.common.scan import (
  CheckpointPolicy,
  checkpointed_scan,
  merge_chunks,
  split_chunks,
)


@flax.struct.dataclass
class Fast:
  """Fast weights of every sequence, with their momentum and context.

  Attributes:
    weight: D, the difference from the learned start; any tree of [B, ...].
    momentum: S, a tree like `weight`; None without momentum.
    segment: in Titans MAC (`models/titans_attention.py`) the current chunk's
      keys and values that attention sees; else None.
  """

  weight: Tree
  momentum: Tree = None
  segment: Tree = None


@flax.struct.dataclass
class ChunkState:
  """State of a fast level between two calls.

  Attributes:
    now: the state after the tokens so far.
    start: `now.weight` as it was at the current chunk's first token.
    position: number of the current chunk's tokens already written, int32.  None
      (then `start` is None, too) if calls read whole chunks only, which is
      cheaper.
  """

  now: Fast
  start: Tree
  position: jax.Array | None

  def map_weights(self, fn: Callable[[Tree], Tree]) -> "ChunkState":
    """The state with `fn` applied to its weights."""
    now = dataclasses.replace(self.now, weight=fn(self.now.weight))
    start = None if self.start is None else fn(self.start)
    return ChunkState(now, start, self.position)

  def reset(self) -> "ChunkState":
    """D = 0 and S = 0, at the same position in the chunk."""
    now, start = jax.tree.map(jnp.zeros_like, (self.now, self.start))
    return ChunkState(now, start, self.position)


def zeros(initial: Tree, batch_size: int) -> Tree:
  """D = 0 for every sequence: [B, *M_0], for M_0 any tree."""
  return jax.tree.map(
    lambda w: jnp.zeros((batch_size, *w.shape), w.dtype), initial
  )


def per_sequence(
  initial: Tree, batch_size: int, axes: tuple[str | None, ...]
) -> Tree:
  """Copies M_0, any tree, for every sequence: [B, *M_0], for scans over chunks.

  `axes` are the logical names of M_0's first axes.  The outer gradient of a
  shared M_0 would be summed over sequences, and over the devices that hold
  them, in every chunk; that of copies is summed once, after the scan.
  """

  def copy(weight: jax.Array) -> jax.Array:
    copies = jnp.broadcast_to(weight, (batch_size, *weight.shape))
    return nn.with_logical_constraint(copies, ("batch", *axes))

  return jax.tree.map(copy, initial)


def zero_state(
  initial: Tree, batch_size: int, *, has_momentum: bool = False
) -> Fast:
  """D = 0, and S = 0 where there is momentum, for every sequence."""
  zero = zeros(initial, batch_size)
  return Fast(zero, zero if has_momentum else None)


def fresh(
  now: Fast, chunk_length: int = 0, read_size: int | None = None
) -> ChunkState:
  """The state at the start of a chunk.

  With a `read_size`, every later call must bring that many tokens.
  """
  if read_size and read_size % chunk_length == 0:
    return ChunkState(now, None, None)
  return ChunkState(now, now.weight, jnp.zeros((), jnp.int32))


class Layout(NamedTuple):
  """How T tokens are divided into `count` chunks of `length` places.

  The first `offset` (None: 0) places of the first chunk belong to earlier
  calls; `live` [N, C] says which places hold a token, None if all do.
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

  def number(self, documents: jax.Array) -> jax.Array:
    """Document numbers [B, T] of all places: [N, B, C].

    Places before the first token get its number, so that the tokens may begin
    with a new document at any offset; places after the last token get its.
    """
    first = 0 if self.offset is None else self.offset
    token = jnp.arange(self.count * self.length) - first
    numbers = jnp.take(documents, jnp.clip(token, 0, self.tokens - 1), axis=1)
    return split_chunks(numbers, self.length, 1)


def plan(tokens: int, chunk_length: int, state: ChunkState | None) -> Layout:
  """Divides `tokens` into chunks; `state` may be inside a chunk."""
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
  """Where documents begin and end, and the state in which one begins.

  Attributes:
    begins: [N, B] chunk n begins with another document than chunk n-1 ended
      with.
    inherits: [N, B, C] the place's document is that of the chunk's first place,
      so that it may read what earlier chunks wrote.
    keeps: [N, B, C] its document is that of the chunk's last place, so that the
      next chunk may read what it writes.
    origin: the state at a document's start.
  """

  begins: jax.Array
  inherits: jax.Array
  keeps: jax.Array
  origin: Fast


def lay_documents(
  documents: jax.Array | None, layout: Layout, origin: Fast
) -> Documents | None:
  """`documents` [B, T] by chunk; None if there are none.

  Only levels that mask (the CMS) allow a document to begin inside a chunk; for
  the others documents must begin on a chunk's border (docs/equations.md).
  """
  if documents is None:
    return None
  number = layout.number(documents)
  first, last = number[..., :1], number[..., -1:]
  before = jnp.pad(last[:-1], ((1, 0), (0, 0), (0, 0)))
  return Documents(
    begins=(first != before)[..., 0],
    inherits=number == first,
    keeps=number == last,
    origin=origin,
  )


def choose(condition_B: jax.Array, a: Tree, b: Tree) -> Tree:
  """For every sequence `a` where the condition holds, else `b`."""

  def pick(x, y):
    return jnp.where(condition_B.reshape(-1, *(1,) * (x.ndim - 1)), x, y)

  return jax.tree.map(pick, a, b)


class Places(NamedTuple):
  """What the places of a chunk hold.

  Attributes:
    live: [C] which places hold a token; None: all do.
    inherits, keeps: [B, C], see `Documents`; None with a single document.
    index: [C] their positions in a whole chunk; None where not needed.
  """

  live: jax.Array | None
  inherits: jax.Array | None = None
  keeps: jax.Array | None = None
  index: jax.Array | None = None


Step = Callable[[Tree, Fast, Tree, Places], tuple[Fast, Tree]]


def scan_chunks(
  step: Step,
  state: ChunkState,
  xs: Tree,
  layout: Layout,
  *,
  chunk_length: int,
  policy: CheckpointPolicy,
  return_state: bool,
  docs: Documents | None = None,
) -> tuple[Tree, ChunkState | None]:
  """Runs `now, y = step(start, now, x, places)` over the chunks.

  Args:
    xs: inputs with chunks first (`Layout.split`).
    return_state: if False, None is returned in place of the state, and the last
      chunk's write is dropped unless there are many chunks (`_outputs`).
    docs: from `lay_documents`.
  """
  # Per chunk: whether it begins with a new document, and whether its first
  # place's document is also its last place's.
  borders = None if docs is None else (docs.begins, docs.keeps[..., 0])
  masks = (None, None) if docs is None else (docs.inherits, docs.keeps)
  inputs = (xs, Places(layout.live, *masks), borders)
  index = jnp.arange(layout.length)
  if state.position is not None and layout.length < chunk_length:
    index = state.position[None]  # one token

  def restart(now, borders):
    if docs is None:
      return now
    return choose(borders[0], docs.origin, now)

  if not return_state or state.position is None:

    def body(now, inputs):
      x, places, borders = inputs
      now = restart(now, borders)
      return step(now.weight, now, x, places._replace(index=index))

    if not return_state:
      return _outputs(body, state.now, inputs, layout.count, policy), None
    now, ys = checkpointed_scan(body, state.now, inputs, policy=policy)
    return ys, ChunkState(now, None, None)

  first = jnp.arange(layout.count) * layout.length
  end = state.position + layout.tokens
  is_next = (first > 0) & (first < end)

  def body_continued(carry, inputs):
    start, now = carry
    is_next, (x, places, borders) = inputs
    now = restart(now, borders)
    start = where(is_next, now.weight, start)
    if docs is not None:
      start = choose(borders[0], now.weight, start)
    now, y = step(start, now, x, places._replace(index=index))
    if docs is not None:
      start = choose(borders[1], start, docs.origin.weight)
    return (start, now), y

  (start, now), ys = checkpointed_scan(
    body_continued, (state.start, state.now), (is_next, inputs), policy=policy
  )
  position = end % chunk_length
  start = where(position == 0, now.weight, start)
  return ys, ChunkState(now, start, position.astype(jnp.int32))


# With at most this many chunks the last one is unrolled, so that XLA can drop
# its unused write; with more, the saving is not worth the compile time.
_MAX_COUNT_APART = 16


def _outputs(
  body: Callable, now: Tree, xs: Tree, count: int, policy: CheckpointPolicy
) -> Tree:
  """What `body` returns for every chunk, without the last state.

  Nothing reads what the last chunk writes.  Unless there are many chunks, it
  runs after the scan, where the compiler drops the write and its gradient.
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


def where(condition: jax.Array, a: Tree, b: Tree) -> Tree:
  """The tree `a` if the scalar condition holds, else `b`."""
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


class MemoryOutput(NamedTuple):
  """What was read; the new state (None if none was given); scalars about the
  learning (None if not requested)."""

  outputs: Tree
  state: Tree
  dynamics: dict[str, Tree] | None


def _heads(initial: Tree, batch_size: int) -> Tree:
  return per_sequence(initial, batch_size, ("heads",))


def _same_tokens(base: Tree, tokens: Tree) -> Tree:
  del base
  return tokens


def _same_chunks(xs: Tree, live: jax.Array | None) -> Tree:
  del live
  return xs


def _same_outputs(base: Tree, tokens: Tree, read: Tree) -> Tree:
  del base, tokens
  return read


class Memory(NamedTuple):
  """One kind of memory: its learning on one chunk, as pure functions.

  `base` is M_0 for every sequence, None where the rule acts on M_0 + D itself.

  Attributes:
    chunk_length: tokens between two states at which gradients are taken.
    policy: what the backward pass stores (`checkpointed_scan`).
    step: (base, start, now, x, places) -> (`Fast` after the chunk, what it
      read, the trace for `dynamics`); `start` are the fast weights at the
      chunk's first token, `now` the fast state before the tokens x.
    prepare: (base, tokens) -> tokens: work on all tokens at once, before they
      are cut into chunks.
    lay_out: (xs, live) -> xs: work on all chunks at once, before the scan; the
      first axis of xs and live is that of chunks.
    finish: (base, tokens, read) -> outputs: work on all tokens at once, after
      the scan.
    dynamics: (base, after, trace, x, places) -> scalars about a chunk.
    spread: (M_0, batch size) -> base.
    has_momentum: whether there is a momentum S.
    acts_on_whole: whether the rule acts on M_0 + D, forgetting towards zero.
    kernel: runs the chunks in a kernel (`memory/fused.py`); None without one.
  """

  chunk_length: int
  policy: CheckpointPolicy
  step: Callable[..., tuple[Fast, Tree, Tree]]
  prepare: Callable[[Tree, Tree], Tree] = _same_tokens
  lay_out: Callable[[Tree, jax.Array | None], Tree] = _same_chunks
  finish: Callable[[Tree, Tree, Tree], Tree] = _same_outputs
  dynamics: Callable[..., dict[str, Tree]] | None = None
  spread: Callable[[Tree, int], Tree] = _heads
  has_momentum: bool = False
  acts_on_whole: bool = False
  kernel: Callable[..., tuple[Tree, ChunkState | None]] | None = None


def run(
  memory: Memory,
  initial: Tree,
  tokens: Tree,
  *,
  axis: int,
  state: ChunkState | None = None,
  documents: jax.Array | None = None,
  with_dynamics: bool = False,
) -> MemoryOutput:
  """Runs a memory along the sequence.

  Args:
    initial: M_0, any tree.
    tokens: what the memory sees, any tree of [B, ...] with T on `axis`.
    state: from an earlier call or `fresh`; None: a new sequence.
    documents: [B, T] document numbers, see the module.
    with_dynamics: whether to return the scalars of `memory.dynamics`, too.
  """
  shape = jax.tree.leaves(tokens)[0].shape
  layout = plan(shape[axis], memory.chunk_length, state)
  return_state = state is not None
  at_border = state is None or state.position is None
  if state is None:
    zero = zero_state(initial, shape[0], has_momentum=memory.has_momentum)
    state = fresh(zero)
  slow, origin = initial, jax.tree.map(jnp.zeros_like, state.now)
  if memory.acts_on_whole:
    whole = lambda fast: jax.tree.map(lambda m, d: m[None] + d, initial, fast)
    slow, state = None, state.map_weights(whole)
    origin = dataclasses.replace(origin, weight=whole(origin.weight))
  docs = lay_documents(documents, layout, origin)
  how: Any = dict(
    chunk_length=memory.chunk_length, return_state=return_state, docs=docs
  )
  summary = None
  if memory.kernel and at_border and not with_dynamics:
    outputs, state = memory.kernel(initial, state, tokens, **how)
  else:
    base = memory.spread(slow, shape[0])

    def step(start, now, x, places):
      after, read, trace = memory.step(base, start, now, x, places)
      found = None
      if with_dynamics and memory.dynamics:
        found = memory.dynamics(base, after, trace, x, places)
      return after, (read, found)

    prepared = memory.prepare(base, tokens)
    xs = jax.tree.map(lambda x: layout.split(x, axis), prepared)
    xs = memory.lay_out(xs, layout.live)
    (outputs, found), state = scan_chunks(
      step, state, xs, layout, policy=memory.policy, **how
    )
    outputs = jax.tree.map(lambda x: layout.merge(x, axis), outputs)
    outputs = memory.finish(base, tokens, outputs)
    summary = None if found is None else dynamics.summarize(found)
  if memory.acts_on_whole and state is not None:
    minus = lambda w: jax.tree.map(lambda a, m: a - m[None], w, initial)
    state = state.map_weights(minus)
  return MemoryOutput(outputs, state, summary)
