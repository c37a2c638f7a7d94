"""Reading on: any number of tokens at a time, into a state of constant size.

Everything that a model remembers of a sequence is one pytree, so that a text
may be read in any parts, today and tomorrow, and equals one pass over all of
it; no token is ever read twice.  This is the only way in which texts are read
outside of training: prompts, sessions and long streams all come through
`extend`.

`inference/reading.py` makes tokens of a file without holding all of it; `reset`
and `relative_change` look after single levels of a state.

Tokens go to the device in pieces of a few sizes (4096, 512, 64, 8, 1), so that
few programs are compiled.  Every piece begins at a multiple of its size: of a
level whose chunk length is a power of two it is whole chunks, which is cheaper,
or it lies inside a single one.

Legend: B batch, T tokens, V vocab, L layers.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import DictKey

from hope_jax.config import ConfigError, MemoryConfig, ModelConfig
from hope_jax.memory import deep, self_modifying, ttt
from hope_jax.memory.chunks import ChunkState
from hope_jax.memory.self_modifying import Boxes
from hope_jax.models import language_model
from hope_jax.models.block import BlockState
from hope_jax.models.language_model import ModelOutput
from hope_jax.training import sharding

State = TypeVar("State")

PIECE = 4096  # tokens of the largest piece, a power of two
RATIO = 8  # of a piece's size to the next smaller one's


@flax.struct.dataclass
class StreamState:
  """What is kept of the tokens read so far.

  Attributes:
    fast: the model's fast state (`language_model.init_state`).
    logits: [B, V] for the next token; NaN before the first one.
    processed: tokens of each sequence that the device has worked on, uint32.
      It is how many the sequence has: nothing is computed twice.
  """

  fast: Any
  logits: Any
  processed: Any


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
  return copy(state)  # zeros may be shared, but what is used up may not


def copy(state: State) -> State:
  """The same state once more, for `extend` to use up."""
  return jax.tree.map(jnp.copy, state)


def shardings(state: StreamState, mesh: Mesh) -> StreamState:
  """Where (abstract) `state` lives on a mesh: rows over its batch axes."""
  return StreamState(
    fast=jax.tree.map(lambda x: sharding.fast_sharding(x, mesh), state.fast),
    logits=sharding.batch_sharding(mesh),
    processed=sharding.replicated(mesh),
  )


def forward(
  params: Any, fast: Any, tokens_BT: jax.Array, *, config: ModelConfig
) -> ModelOutput:
  """Logits [B, T, V] and the fast state after tokens that continue `fast`."""
  model = language_model.LanguageModel(config)
  return language_model.forward(model, params, tokens_BT, state=fast)


class Scores(NamedTuple):
  """Of tokens, each given all before it: log-probability, and whether it was
  the likeliest."""

  log_probs: jax.Array
  is_likeliest: jax.Array


def score(logits: jax.Array, tokens: jax.Array) -> Scores:
  """`Scores` [...] of one token each under logits [..., V]."""
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return Scores(
    chosen - jax.nn.logsumexp(logits, axis=-1),
    jnp.argmax(logits, axis=-1) == tokens,
  )


def read(
  params: Any, state: StreamState, tokens_BT: jax.Array, *, config: ModelConfig
) -> tuple[Scores, StreamState]:
  """(`Scores` [B, T], state after) of one piece."""
  batch_size, length = tokens_BT.shape
  shapes = jax.eval_shape(
    lambda: language_model.init_state(config, batch_size, length)
  )
  fast = _at_border(state.fast, shapes)
  output = forward(params, fast, tokens_BT, config=config)
  first = score(state.logits[:, None], tokens_BT[:, :1])
  later = score(output.logits[:, :-1], tokens_BT[:, 1:])
  scores = jax.tree.map(
    lambda *parts: jnp.concatenate(parts, axis=1), first, later
  )
  return scores, StreamState(
    _anywhere(output.state, state.fast),
    output.logits[:, -1],
    state.processed + jnp.uint32(length),
  )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def read_piece(
  params: Any, state: StreamState, tokens_BT: jax.Array, *, config: ModelConfig
) -> tuple[jax.Array, StreamState]:
  """(log-probabilities [B, T], state after) of one piece."""
  scores, state = read(params, state, tokens_BT, config=config)
  return scores.log_probs, state


def _is_level(x: Any) -> bool:
  return isinstance(x, ChunkState)


def _at_border(fast: Any, shapes: Any) -> Any:
  """`fast` as pieces of whole chunks take it, where `shapes` has it so."""

  def convert(level: Any, like: Any) -> Any:
    if not _is_level(level) or like.position is not None:
      return level
    return ChunkState(level.now, None, None)

  return jax.tree.map(convert, fast, shapes, is_leaf=_is_level)


def _anywhere(fast: Any, before: Any) -> Any:
  """Inverse of `_at_border`: a state for pieces of any size."""

  def convert(old: Any, level: Any) -> Any:
    if not _is_level(level) or level.position is not None:
      return level
    return ChunkState(level.now, level.now["weight"], old.position)

  return jax.tree.map(convert, before, fast, is_leaf=_is_level)


def piece_sizes(position: int, count: int, largest: int) -> Iterator[int]:
  """In which pieces `count` tokens are read that follow `position` others."""
  while count:
    size = largest
    while size > count or position % size:
      size = max(1, size // RATIO)
    yield size
    position, count = position + size, count - size


def extend(
  params: Any,
  state: StreamState,
  tokens: np.ndarray,
  *,
  config: ModelConfig,
  piece: int = PIECE,
) -> Extension:
  """Reads `tokens` [B, T], any T, on from `state`, which is used up (`copy`).

  Raises:
    ValueError: tokens of another shape, or outside of the vocabulary.
    ConfigError: attention's cache cannot hold so many tokens.
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
  for size in piece_sizes(position, count, piece):
    part = jnp.asarray(tokens[:, begin : begin + size], jnp.int32)
    log_probs, state = read_piece(params, state, part, config=config)
    found.append(log_probs)
    begin += size
  log_probs = np.concatenate(jax.device_get(found), axis=1)
  return Extension(jnp.copy(state.logits), log_probs, state)


def check_room(config: ModelConfig, position: int, count: int) -> None:
  """`ConfigError` if attention cannot read so many tokens on."""
  if config.has_longest_context and position + count > config.context_length:
    raise ConfigError(
      f"{position} tokens and {count} more are too many for attention: its"
      f" cache holds model.context_length={config.context_length}"
    )


def reset(
  state: StreamState, levels: Sequence[str], config: ModelConfig
) -> StreamState:
  """`state` in which `levels` are as at the start: their D and S are zero.

  What they have of a chunk that is not over is zero, too; the chunk ends where
  it would have ended (what levels with the next-token signal learn there, they
  learn from all of it).  Convolutions and attention keep what they have seen.
  """

  def empty(path: Any, x: Any) -> Any:
    names = {key.key for key in path if isinstance(key, DictKey)}
    for level in levels:
      if level in names:
        is_place = jnp.issubdtype(x.dtype, jnp.integer)
        x = x if is_place else jnp.zeros_like(x)
      elif _is_boxes(x) and level in config.memory.adaptive:
        x = self_modifying.without_box(x, level, config.memory)
    return x

  fast = jax.tree_util.tree_map_with_path(empty, state.fast, is_leaf=_is_boxes)
  return dataclasses.replace(state, fast=fast)


def _is_boxes(x: Any) -> bool:
  return isinstance(x, Boxes)


def relative_change(
  params: Any, state: StreamState, config: ModelConfig
) -> dict[str, float]:
  """|D| / |M_0| of every fast level, median over layers, rows and heads."""
  blocks, changes = params["blocks"], {}
  for level in config.fast_levels:
    if level.startswith("cms_"):
      number = level.removeprefix("cms_")
      slow = blocks["cms"].get(f"level_{number}") or blocks["cms"]["levels"]
      fast = cms_weight(state.fast, level)._asdict()
      initial = {name: slow[name][-len(x) :] for name, x in fast.items()}
    else:
      slow = blocks["mixer"]["initial"]
      initial, fast = _mixer_level(slow, state.fast.mixer, level, config.memory)
    by_layer = jax.vmap(deep.relative_change)(initial, fast)
    changes[level] = float(jnp.median(by_layer))
  return changes


def cms_weight(fast: Any, level: str) -> Any:
  """D of a CMS level in the layers that learn, the last ones."""
  if isinstance(fast, BlockState):
    return fast.cms[level].now["weight"]
  return fast.levels[level].weight  # with the next-token signal


def _mixer_level(
  slow: Any, mixer: Any, level: str, cfg: MemoryConfig
) -> tuple[Any, Any]:
  """(M_0, D) of the memory or of a box, layers on axis 0."""
  group = "memory" if level == "memory" else "boxes"
  state = mixer[group]  # a `ChunkState` of what learns by chunks
  fast: Any = (state if isinstance(state, dict) else state.now)["weight"]
  matrix = lambda x: x.weight if isinstance(x, ttt.Layer) else x
  fast = type(fast)(*map(matrix, fast))
  initial = type(fast)(
    *(slow.get(f"{group}_{name}") for name in type(fast)._fields)
  )
  if group == "memory":
    return initial, fast
  only_box = self_modifying.only_box
  return only_box(initial, level, cfg), only_box(fast, level, cfg)
