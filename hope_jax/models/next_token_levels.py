"""Levels that learn from the next-token loss, and the state of a sequence.

`advance` updates every level from one chunk's gradient, which
`models/next_token.py` computes; symbols are as there.

Legend: B batch, T tokens, C shortest chunk length, D model, L layers, K
learning layers.
"""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree

from hope_jax.config import ModelConfig
from hope_jax.memory import chunks
from hope_jax.memory.cms import LevelWeights
from hope_jax.models import cms as cms_layer
from hope_jax.models.interface import FastState, Parts, owned


class Level(NamedTuple):
  """D and the sum of gradients in the level's current chunk, both LevelWeights
  with axes [K, B] first.  The level with the shortest chunk, which needs one
  gradient only, has no sum (None)."""

  weight: LevelWeights
  gradient: LevelWeights | None


@flax.struct.dataclass
class NextTokenState(FastState):
  """The fast state of a model whose levels learn from the next-token loss.

  Attributes:
    mixer: the sequence layers' fast state, with an axis of L layers first.
    start: `mixer` of the last K - 1 layers before the pending chunk; None if K
      is 1.
    levels: `Level` by name.
    tokens: [B, C] the current chunk's tokens; the first `pending` are valid.
    stream: [1, B, C, D] the input of the first learning layer's CMS for them.
    position: number of tokens that were learned from since the slowest level's
      chunk began.
    document: [B] number of the last token's document.
    first_document: [B] number of the pending chunk's first document.
    begins: [B] 1 if that document began with the pending chunk, else 0.
  """

  mixer: Tree
  levels: dict[str, Level]
  start: Tree = owned("cms_0")
  tokens: jax.Array = owned("cms_0")
  stream: jax.Array = owned("cms_0")
  pending: jax.Array = owned("cms_0")
  position: jax.Array = owned("cms_0")
  document: jax.Array = owned("cms_0")
  first_document: jax.Array = owned("cms_0")
  begins: jax.Array = owned("cms_0")

  def parts(self, config: ModelConfig) -> Parts:
    """See `FastState`."""
    for name, level in self.levels.items():
      yield (name,), level
    yield from self.mixer.parts(config)
    for field in dataclasses.fields(self):
      if field.name not in ("mixer", "levels"):
        yield (field.metadata["owner"],), getattr(self, field.name)

  def cms_weight(self, name: str) -> LevelWeights:
    """D of a CMS level in the learning layers, which are the last ones."""
    return self.levels[name].weight

  def reset_cms(self, name: str) -> "NextTokenState":
    """The state with one CMS level reset to its start."""
    zero = jax.tree.map(jnp.zeros_like, self.levels[name])
    return dataclasses.replace(self, levels=self.levels | {name: zero})


def is_on(config: ModelConfig) -> bool:
  """Whether any level of the model learns from the next-token loss."""
  return config.cms.signal == "next_token" and any(
    config.is_live(name) for name in _names(config)
  )


def init_state(
  config: ModelConfig, mixer: Tree, batch_size: int
) -> NextTokenState:
  """The state before the first token; `mixer` is the L sequence layers'."""
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
    start=layers_above(mixer, config),
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
  """Number K of learning layers, which are the last ones."""
  return max(1, round(config.cms.learning_share * config.num_layers))


def layers_above(mixer: Tree, config: ModelConfig) -> Tree:
  """`mixer` of the last K - 1 layers, those above the first learning level."""
  count = learning_layers(config) - 1
  return jax.tree.map(lambda x: x[-count:], mixer) if count else None


def weights_of(levels: dict[str, Level]) -> dict[str, LevelWeights]:
  return {name: level.weight for name, level in levels.items()}


def advance(
  levels: dict[str, Level],
  gradients: dict[str, LevelWeights],
  params: Tree,
  position: jax.Array,
  is_other: jax.Array | None,
  *,
  config: ModelConfig,
) -> tuple[dict[str, Level], jax.Array]:
  """All levels and the position after one chunk of the shortest length.

  Args:
    is_other: [B] whether the next token belongs to another document than the
      chunk's first token; if so, all levels are reset.
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
  """One level after a chunk of the shortest length.

  Args:
    gradient: of that chunk's mean loss.
    rates: eta and log alpha (None: nothing is forgotten), [K] each.
    is_due: whether the level's own chunk, which consists of `parts` shortest
      ones, is complete.
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
  params: Tree, config: ModelConfig, level: int
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


def _names(config: ModelConfig) -> list[str]:
  return [f"cms_{i}" for i in range(len(config.cms.fast_lengths))]
