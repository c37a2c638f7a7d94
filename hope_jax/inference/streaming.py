"""Incremental prefill: feeds tokens in any increments into a state of constant
size.

Everything that a model remembers of a sequence is one pytree, so that a text
may be read in any parts, with the result of one pass over all of it; no token
is read twice.  Prompts, sessions and long streams are all read by `extend`;
`inference/scoring.py` batches `read`.

`inference/reading.py` makes tokens of a file without holding all of it; `reset`
resets single levels of a state.

Tokens go to the device in reads of a few sizes (4096, 512, 64, 8, 1), so that
few programs are compiled.  Every read begins at a multiple of its size, so for
a level whose chunk length is a power of two it either covers whole chunks,
which is cheaper, or lies inside a single one.

Legend: B batch, T tokens, V vocab, L layers.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import ArrayPytree as Tree
from jax.sharding import Mesh

from hope_jax.config import ConfigError, ModelConfig
from hope_jax.models import fast_state, language_model
from hope_jax.models.language_model import ModelOutput
from hope_jax.training import sharding

State = TypeVar("State")

READ_SIZE = 4096  # tokens of the largest read, a power of two
RATIO = 8  # of a read's size to the next smaller one's


@flax.struct.dataclass
class StreamState:
  """What is kept of the tokens read so far.

  Attributes:
    fast: the model's fast state (`language_model.init_state`).
    logits: [B, V] for the next token; NaN before the first one.
    processed: tokens of each sequence that the device has processed, uint32:
      exactly those that were read, for none is processed twice.
  """

  fast: Tree
  logits: Tree
  processed: Tree


class Extension(NamedTuple):
  """logits [B, V] for the next token, on the device; log_probs [B, T] of the
  tokens read, given all before them (NaN for a sequence's first token), on the
  host; the state after them."""

  logits: jax.Array
  log_probs: np.ndarray
  state: StreamState


def start(config: ModelConfig, batch_size: int = 1) -> StreamState:
  """The state before the first token."""
  state = StreamState(
    fast=language_model.init_state(config, batch_size),
    logits=jnp.full((batch_size, config.vocab_size), jnp.nan, jnp.float32),
    processed=jnp.zeros((), jnp.uint32),
  )
  return copy(state)  # zeros may be shared, but donated buffers may not


def copy(state: State) -> State:
  """A copy of the state, whose buffers can be donated to `extend`."""
  return jax.tree.map(jnp.copy, state)


def shardings(state: StreamState, mesh: Mesh) -> StreamState:
  """Where (abstract) `state` lives on a mesh: rows over its batch axes."""
  return StreamState(
    fast=jax.tree.map(lambda x: sharding.fast_sharding(x, mesh), state.fast),
    logits=sharding.batch_sharding(mesh),
    processed=sharding.replicated(mesh),
  )


def forward(
  params: Tree, fast: Tree, tokens_BT: jax.Array, *, config: ModelConfig
) -> ModelOutput:
  """Logits [B, T, V] and the fast state after tokens that continue `fast`."""
  model = language_model.LanguageModel(config)
  return language_model.forward(model, params, tokens_BT, state=fast)


class Scores(NamedTuple):
  """The log-probability of each token, given all before it, and whether it was
  the likeliest."""

  log_probs: jax.Array
  is_likeliest: jax.Array


def score(logits: jax.Array, tokens: jax.Array) -> Scores:
  """`Scores` [...] of `tokens` [...] under `logits` [..., V]."""
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return Scores(
    chosen - jax.nn.logsumexp(logits, axis=-1),
    jnp.argmax(logits, axis=-1) == tokens,
  )


def read(
  params: Tree, state: StreamState, tokens_BT: jax.Array, *, config: ModelConfig
) -> tuple[Scores, StreamState]:
  """(`Scores` [B, T], state after) of one read."""
  batch_size, length = tokens_BT.shape
  shapes = jax.eval_shape(
    lambda: language_model.init_state(config, batch_size, length)
  )
  fast = fast_state.at_border(state.fast, shapes)
  output = forward(params, fast, tokens_BT, config=config)
  first = score(state.logits[:, None], tokens_BT[:, :1])
  later = score(output.logits[:, :-1], tokens_BT[:, 1:])
  scores = jax.tree.map(
    lambda *parts: jnp.concatenate(parts, axis=1), first, later
  )
  return scores, StreamState(
    fast_state.anywhere(output.state, state.fast),
    output.logits[:, -1],
    state.processed + jnp.uint32(length),
  )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def read_once(
  params: Tree, state: StreamState, tokens_BT: jax.Array, *, config: ModelConfig
) -> tuple[jax.Array, StreamState]:
  """(log-probabilities [B, T], state after) of one read."""
  scores, state = read(params, state, tokens_BT, config=config)
  return scores.log_probs, state


def read_sizes(position: int, count: int, largest: int) -> Iterator[int]:
  """The sizes of the reads of `count` tokens after `position` others."""
  while count:
    size = largest
    while size > count or position % size:
      size = max(1, size // RATIO)
    yield size
    position, count = position + size, count - size


def extend(
  params: Tree,
  state: StreamState,
  tokens: np.ndarray,
  *,
  config: ModelConfig,
  read_size: int = READ_SIZE,
) -> Extension:
  """Continues `state` with `tokens` [B, T], any T.

  The buffers of `state` are donated: pass `copy(state)` to keep it.

  Raises:
    ValueError: tokens of another shape, or outside of the vocabulary.
    ConfigError: attention's cache cannot hold that many tokens.
  """
  if tokens.ndim != 2 or len(tokens) != len(state.logits):
    raise ValueError(f"{tokens.shape=} is not [{len(state.logits)}, T]")
  if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
    raise ValueError(
      f"tokens {tokens.min()} .. {tokens.max()} are not all below"
      f" {config.vocab_size=}"
    )
  position, count = int(state.processed), tokens.shape[1]
  check_room(config, position, count)
  found, begin = [np.zeros((len(tokens), 0), np.float32)], 0
  for size in read_sizes(position, count, read_size):
    part = jnp.asarray(tokens[:, begin : begin + size], jnp.int32)
    log_probs, state = read_once(params, state, part, config=config)
    found.append(log_probs)
    begin += size
  log_probs = np.concatenate(jax.device_get(found), axis=1)
  return Extension(jnp.copy(state.logits), log_probs, state)


def check_room(config: ModelConfig, position: int, count: int) -> None:
  """`ConfigError` if attention's cache cannot hold that many more tokens."""
  if config.has_longest_context and position + count > config.context_length:
    raise ConfigError(
      f"{position} tokens and {count} more are too many for attention: its"
      f" cache holds model.context_length={config.context_length}"
    )


def reset(
  state: StreamState, levels: Sequence[str], config: ModelConfig
) -> StreamState:
  """`state` with `levels` as they are at the start, see `fast_state.reset`."""
  fast = fast_state.reset(state.fast, levels, config)
  return dataclasses.replace(state, fast=fast)
