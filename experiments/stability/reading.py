"""Long token streams through a model's carried state, measured as they go.

A stream is read in pieces of fixed length with the state carried from one to
the next, as `streaming.extend` does for a session; here several streams are
the rows of one batch, and every logit is looked at.

Legend: B streams, T tokens of a piece, N tokens of a stream, V vocab, L layers,
R tokens from one on.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments.lib.trials import Trial, resolve
from hope_jax.config import Config, ConfigError, ModelConfig
from hope_jax.data import text as text_lib
from hope_jax.data import tokenizer
from hope_jax.inference import streaming, trained
from hope_jax.models import fast_state, language_model
from hope_jax.models.interface import Level
from hope_jax.runs import workdir as workdir_lib

CONFIG, MODE = "configs/shakespeare.py", "{},long"
STREAMS = ("repeated", "noise", "text", "changed")
REPEATED = ord("e")
PASSAGE = 16  # tokens at the start of `text` that differ in `changed`


class Source(NamedTuple):
  """A model: its name, where its weights come from, config, parameters."""

  model: str
  weights: str
  config: ModelConfig
  params: Any


def default_config(model: str) -> Config:
  """Of a model in configs/shakespeare.py."""
  mode = MODE.format(model)
  trial = Trial(group="", row="", name="", config=CONFIG, mode=mode)
  return resolve(trial)


def initial_source(model: str, config: ModelConfig) -> Source:
  """A model with its initial parameters, seed 0."""
  tokens = jnp.zeros((1, 16), jnp.int32)
  init = lambda key: language_model.LanguageModel(config).init(key, tokens)
  params = nn.unbox(jax.jit(init)(jax.random.key(0))["params"])
  return Source(model, "initial", config, params)


def trained_source(workdir: epath.Path) -> Source:
  """The newest checkpoint of a run on text as bytes."""
  config = workdir_lib.read_config(workdir)
  if config.data.kind != "text" or not config.model.memory_chunks:
    raise ConfigError(
      f"{workdir} holds {config.model.sequence_layer} on {config.data.kind}:"
      " the streams are text, for titans and hope"
    )
  step, params = trained.read_on_one_device(workdir, config)
  params = jax.tree.map(jnp.asarray, jax.device_get(params))
  weights = f"{workdir.name}, {step} steps"
  return Source(config.model.sequence_layer, weights, config.model, params)


def with_chunk(config: ModelConfig, chunk_length: int) -> ModelConfig:
  """`config` with another memory chunk; the other chunks keep their ratios."""
  old = config.memory.chunk_length

  def scaled(length: int) -> int:
    if length * chunk_length % old:
      raise ConfigError(
        f"a chunk of {length} tokens beside {old} has no whole length beside"
        f" {chunk_length}"
      )
    return length * chunk_length // old

  memory = dataclasses.replace(
    config.memory,
    chunk_length=chunk_length,
    projection_chunk_length=scaled(config.memory.projection_chunk_length),
  )
  fast = config.cms.fast_lengths  # those of the optimizer stay
  rest = config.cms.chunk_lengths[len(fast) :]
  cms = dataclasses.replace(
    config.cms, chunk_lengths=(*map(scaled, fast), *rest)
  )
  return dataclasses.replace(config, memory=memory, cms=cms)


def held_out(path: str | None = None) -> np.ndarray:
  """Bytes of a text: a file, or what training on the config does not see."""
  if path is not None:
    return text_lib.read(text_lib.find(path))
  splits = text_lib.read_splits(default_config("titans").data)
  return np.concatenate([splits["valid"], splits["test"]])


def streams(text: np.ndarray, count: int, vocab_size: int) -> np.ndarray:
  """All STREAMS, int32 [B, N]; the text is repeated if it is shorter."""
  if vocab_size < tokenizer.VOCAB_SIZE or len(text) < 4 * PASSAGE:
    raise ConfigError(
      f"the text has {len(text)} bytes and the model {vocab_size} tokens: at"
      f" least {4 * PASSAGE} and {tokenizer.VOCAB_SIZE} are needed"
    )
  real = np.resize(text, count).astype(np.int32)
  changed = real.copy()
  middle = len(text) // 2
  changed[:PASSAGE] = text[middle : middle + PASSAGE]
  noise = np.random.default_rng(0).integers(vocab_size, size=count)
  rows = np.full(count, REPEATED), noise, real, changed
  return np.stack(rows).astype(np.int32)


class Measured(NamedTuple):
  """The end of a piece by stream [B]; of several pieces [pieces, B].

  Attributes:
    logits_finite: all logits of the piece are finite.
    state_finite: the whole state is finite.
    size: by level, the largest |D| and |S| of any weight; infinite if one is
      not finite.
    moved: by level, the median over layers and heads of |D| / |M_0|.
  """

  logits_finite: Any
  state_finite: Any
  size: dict[str, Any]
  moved: dict[str, Any]


def _by_stream(fn: Callable, x: jax.Array) -> jax.Array:
  """`fn` over all axes of a state [L, B, ...] but the streams'."""
  return fn(x, axis=(0, *range(2, x.ndim)))


def _size(level: Level) -> jax.Array:
  # A maximum may pass over NaN.
  parts = [
    _by_stream(jnp.max, jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf))
    for x in jax.tree.leaves((level.weight, level.momentum))
  ]
  return functools.reduce(jnp.maximum, parts)


def _moved(level: Level) -> jax.Array:
  def square(tree: Any) -> jax.Array:
    return sum(
      (jnp.sum(jnp.square(x), axis=(-2, -1)) for x in jax.tree.leaves(tree)),
      start=jnp.zeros(()),
    )

  ratio = jnp.sqrt(square(level.weight) / square(level.start)[:, None])
  return jnp.median(jnp.moveaxis(ratio, 1, 0).reshape(ratio.shape[1], -1), 1)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def read_piece(
  params: Any, state: Any, tokens_BT: jax.Array, *, config: ModelConfig
) -> tuple[jax.Array, Measured, Any]:
  """All streams read on by one piece: (logits [B, T, V], measured, state)."""
  model = language_model.LanguageModel(config)
  output = language_model.forward(model, params, tokens_BT, state=state)
  finite = [
    _by_stream(jnp.all, jnp.isfinite(x))
    for x in jax.tree.leaves(output.state)
    if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  found = fast_state.levels(params, output.state, config)
  measured = Measured(
    jnp.all(jnp.isfinite(output.logits), axis=(1, 2)),
    functools.reduce(jnp.logical_and, finite),
    {name: _size(level) for name, level in found.items()},
    {name: _moved(level) for name, level in found.items()},
  )
  return output.logits, measured, output.state


def read(
  params: Any,
  tokens_BN: np.ndarray,
  *,
  config: ModelConfig,
  piece: int,
  at: int | None = None,
) -> tuple[Measured, np.ndarray | None]:
  """Reads whole streams in pieces of `piece` tokens, which divides N.

  Returns what was measured after every piece, and the logits [B, R, V] from
  token `at` to the end of its piece.
  """
  rows, count = tokens_BN.shape
  if count % piece:
    raise ConfigError(f"{count} tokens are not whole pieces of {piece}")
  # Zeros may be shared, but what is used up may not.
  state = streaming.copy(language_model.init_state(config, rows, piece))
  ends, kept = [], None
  for first in range(0, count, piece):
    tokens = jnp.asarray(tokens_BN[:, first : first + piece])
    logits, measured, state = read_piece(params, state, tokens, config=config)
    ends.append(jax.device_get(measured))
    if at is not None and first <= at < first + piece:
      kept = np.asarray(logits[:, at - first :])
  return jax.tree.map(lambda *x: np.stack(x), *ends), kept
