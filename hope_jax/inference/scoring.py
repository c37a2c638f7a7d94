"""Scores continuations of contexts; shared prefixes are evaluated once.

All sequences (context and continuation) form a tree of blocks of tokens: a
shared prefix (the examples before the questions, a question before its
choices), up to its last whole block, is a node that is read once.  Its state is
kept until everything that follows it has been read.

Nodes are read in batches of rows, each row at its own position with a state of
its own: a step reads one of `streaming.py`'s few sizes in the rows that need
it, while the others wait.  So nothing is padded where a state is needed, and a
row's result does not depend on the other rows.  A sequence's last block, after
which no state is needed, is padded on the right.

Legend: N rows, T tokens of a read, V vocab.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import ArrayPytree as Tree

from hope_jax.config import ModelConfig
from hope_jax.inference import streaming
from hope_jax.inference.streaming import Scores, StreamState
from hope_jax.memory import chunks
from hope_jax.models import next_token_levels

NODE_LENGTH = 64  # tokens of a node, at least
READ_SIZE = 512  # tokens of a row at a time: logits [N, T, V] are held
LEAST = 32  # tokens of the shortest padded block
LEAST_CACHE = 256  # places of attention's smallest cache

Item = TypeVar("Item")


class Request(NamedTuple):
  """A context of at least one token, and what follows it."""

  context: Sequence[int]
  continuation: Sequence[int]


class Score(NamedTuple):
  """A continuation's score: the sum of its tokens' log-probabilities, and
  whether each of them was the likeliest."""

  log_prob: float
  is_greedy: bool


class Read(NamedTuple):
  """What is known after `position` tokens: their `Scores` [position] in parts,
  on the host; the state, with batch 1."""

  position: int
  scores: tuple[Scores, ...]
  state: StreamState


class Row(NamedTuple):
  """Tokens to read next."""

  before: Read
  tokens: Sequence[int]


@dataclasses.dataclass
class Node:
  """Tokens after the parent's; numbers of the sequences that end with them."""

  tokens: list[int]
  numbers: list[int] = dataclasses.field(default_factory=list)
  children: dict[tuple[int, ...], "Node"] = dataclasses.field(
    default_factory=dict
  )


def block_length(config: ModelConfig) -> int:
  """Tokens of a block: at its end, CMS levels that learn from the next token
  can continue with any number of tokens."""
  if next_token_levels.is_on(config):
    return math.lcm(NODE_LENGTH, config.cms.fast_lengths[0])
  return NODE_LENGTH


def grow(sequences: Sequence[Sequence[int]], block: int) -> Node:
  """The tree of sequences; its root has no tokens."""
  root = Node([])
  for number, tokens in enumerate(sequences):
    node = root
    for begin in range(0, len(tokens), block):
      part = tuple(tokens[begin : begin + block])
      node = node.children.setdefault(part, Node(list(part)))
    node.numbers.append(number)
  return root


def _children(node: Node) -> list[Node]:
  """A node's children, the longest first, each merged with the blocks after it
  up to the next branch or end of a sequence."""
  found = []
  for child in node.children.values():
    while not child.numbers and len(child.children) == 1:
      (rest,) = child.children.values()
      child = Node(child.tokens + rest.tokens, rest.numbers, rest.children)
    found.append(child)
  return sorted(found, key=lambda child: -len(child.tokens))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="states")
def read_once(
  params: Tree,
  states: StreamState,
  tokens_NT: jax.Array,
  is_read_N: jax.Array,
  *,
  config: ModelConfig,
) -> tuple[Scores, StreamState]:
  """Reads tokens in the rows where `is_read_N` is set; others stay as they are.

  Returns `Scores` [N, T] (meaningless in the other rows) and the states.
  """

  def one(state: StreamState, tokens_T: jax.Array) -> tuple[Scores, Any]:
    scores, state = streaming.read(params, state, tokens_T[None], config=config)
    return jax.tree.map(lambda x: x[0], scores), state

  if next_token_levels.is_on(config):  # vmap would update every time
    count = tokens_NT.shape[1]
    nothing = Scores(jnp.zeros(count), jnp.zeros(count, bool))
    return jax.lax.map(
      lambda xs: jax.lax.cond(
        xs[0], one, lambda state, _: (nothing, state), *xs[1:]
      ),
      (is_read_N, states, tokens_NT),
    )
  scores, after = jax.vmap(one)(states, tokens_NT)
  return scores, chunks.choose(is_read_N, after, states)


@functools.partial(jax.jit, static_argnames="config")
def read_last(
  params: Tree,
  states: StreamState,
  tokens_NT: jax.Array,
  *,
  config: ModelConfig,
) -> Scores:
  """`Scores` [N, T] of tokens after which nothing is read."""

  def one(state: StreamState, tokens_T: jax.Array) -> Scores:
    output = streaming.forward(
      params, state.fast, tokens_T[None], config=config
    )
    before = jnp.concatenate([state.logits, output.logits[0, :-1]])
    return streaming.score(before, tokens_T)

  if next_token_levels.is_on(config):
    return jax.lax.map(lambda xs: one(*xs), (states, tokens_NT))
  return jax.vmap(one)(states, tokens_NT)


def stack(states: Sequence[Any], batch_size: int) -> Any:
  """States of batch 1 as `batch_size` rows; the last is repeated, for programs
  are compiled for one number of rows."""
  rows = [*states, *[states[-1]] * (batch_size - len(states))]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def read(
  params: Tree, rows: Sequence[Row], *, config: ModelConfig, batch_size: int
) -> list[Read]:
  """Reads at most `batch_size` rows."""
  states = stack([row.before.state for row in rows], batch_size)
  done, found = [0] * len(rows), []
  while True:
    sizes = [
      next(
        streaming.read_sizes(
          row.before.position + n, len(row.tokens) - n, READ_SIZE
        ),
        0,
      )
      for row, n in zip(rows, done, strict=True)
    ]
    wanted = collections.Counter(size for size in sizes if size)
    if not wanted:
      break
    size = max(wanted, key=lambda size: (wanted[size], size))
    tokens = np.zeros((batch_size, size), np.int32)
    is_read = np.zeros(batch_size, bool)
    for n, row in enumerate(rows):
      if sizes[n] == size:
        is_read[n] = True
        tokens[n] = row.tokens[done[n] : done[n] + size]
        done[n] += size
    scores, states = read_once(
      params, states, jnp.asarray(tokens), jnp.asarray(is_read), config=config
    )
    found.append((is_read, scores))
  parts = [row.before.scores for row in rows]
  for is_read, scores in jax.device_get(found):
    for n in np.flatnonzero(is_read):
      parts[n] += (jax.tree.map(lambda x, n=n: x[n], scores),)
  return [
    Read(
      row.before.position + len(row.tokens),
      parts[n],
      jax.tree.map(lambda x, n=n: x[n], states),
    )
    for n, row in enumerate(rows)
  ]


def read_all(
  params: Tree,
  sequences: Sequence[Sequence[int]],
  *,
  config: ModelConfig,
  batch_size: int,
) -> Iterator[tuple[int, Read]]:
  """(number of a sequence, what is known after it) of all, in any order.

  A node's children are read before its siblings, so that few states are held at
  a time.
  """
  root = grow(sequences, block_length(config))
  beginning = Read(0, (), streaming.start(config))
  yield from ((number, beginning) for number in root.numbers)
  todo = [(child, beginning) for child in _children(root)]
  while todo:
    nodes, before = zip(*todo[-batch_size:], strict=True)
    del todo[-batch_size:]
    rows = [
      Row(read, node.tokens) for node, read in zip(nodes, before, strict=True)
    ]
    ends = read(params, rows, config=config, batch_size=batch_size)
    for node, end in zip(nodes, ends, strict=True):
      yield from ((number, end) for number in node.numbers)
      todo += [(child, end) for child in _children(node)]


def _power_of_two(least: int, count: int) -> int:
  return max(least, 1 << (count - 1).bit_length())


def with_cache(config: ModelConfig, count: int) -> ModelConfig:
  """`config` with a cache for `count` tokens, rounded up to one of a few sizes,
  instead of the longest; unchanged if attention has no cache that grows."""
  if not config.has_longest_context:
    return config
  size = _power_of_two(LEAST_CACHE, count)
  return dataclasses.replace(config, context_length=size)


def score(
  params: Tree,
  requests: Sequence[Request],
  *,
  config: ModelConfig,
  batch_size: int,
) -> Iterator[tuple[int, Score]]:
  """(number of a request, score of its continuation) of all, in any order."""
  block = block_length(config)
  groups: dict[ModelConfig, list[int]] = {}
  for number, request in enumerate(requests):
    assert len(request.context), "an empty context"
    count = len(request.context) + len(request.continuation)
    group = with_cache(config, -(-count // block) * block)
    groups.setdefault(group, []).append(number)
  for group, numbers in groups.items():
    found = _score_group(
      params,
      [requests[number] for number in numbers],
      config=group,
      batch_size=batch_size,
    )
    yield from ((numbers[place], score) for place, score in found)


def _score_group(
  params: Tree,
  requests: Sequence[Request],
  *,
  config: ModelConfig,
  batch_size: int,
) -> Iterator[tuple[int, Score]]:
  """`score` of requests that one `config` serves."""
  block = block_length(config)
  sequences = [
    [*request.context, *request.continuation] for request in requests
  ]
  whole = [tokens[: (len(tokens) - 1) // block * block] for tokens in sequences]
  ends = read_all(params, whole, config=config, batch_size=batch_size)
  for batch in batched(ends, batch_size):
    states = stack([read.state for _, read in batch], batch_size)
    rest = [sequences[number][read.position :] for number, read in batch]
    length = _power_of_two(min(LEAST, block), max(map(len, rest)))
    tokens = np.zeros((batch_size, length), np.int32)
    for n, part in enumerate(rest):
      tokens[n, : len(part)] = part
    last = jax.device_get(
      read_last(params, states, jnp.asarray(tokens), config=config)
    )
    for n, (number, read) in enumerate(batch):
      parts = [*read.scores, Scores(*(x[n, : len(rest[n])] for x in last))]
      begin = len(requests[number].context)
      log_probs, is_likeliest = (
        np.concatenate(x)[begin:] for x in zip(*parts, strict=True)
      )
      total = float(log_probs.sum(dtype=np.float64))
      yield number, Score(total, bool(is_likeliest.all()))


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
  """Lists of `size` items; the last one may be shorter."""
  rest = iter(items)
  while batch := list(itertools.islice(rest, size)):
    yield batch
