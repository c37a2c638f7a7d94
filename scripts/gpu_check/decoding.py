"""Decoding one sequence: tokens/s after 1K and 64K tokens of context.

Hope and Titans read that many random tokens (`streaming.extend`) and then
decode: their state has the same size everywhere, so the time must not depend on
the position.  1M tokens are not read; the last row says what is known about
that position.  Transformer++ gets a cache of the context's length that counts
as filled: its time depends on that length only (`benchmark_generation.py`).
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from hope_jax.config import ModelConfig
from hope_jax.inference import generation, streaming
from hope_jax.models import language_model
from scripts import benchmark_generation
from scripts.gpu_check import training
from scripts.gpu_check.plan import Row

FAR = 1 << 20  # a position that is not reached by reading
PIECE = 512  # tokens read at a time: one program for all places
BLOCKS, SECONDS = 8, 8.0  # of a place: at most


def rows(
  model: str, places: Sequence[int], tiny: bool = False
) -> Iterator[Row]:
  """A row per place, and one about the place that is not read to."""
  config = training.make_config(model, 128 if tiny else 4096, 1, tiny).model
  module = language_model.LanguageModel(config)
  tokens = np.zeros((1, 8), np.int32)
  variables: Any = jax.jit(module.init)(jax.random.key(0), tokens)
  params = nn.unbox(variables["params"])
  if config.has_attention:
    yield from _with_cache(params, config, model, places, 1 if tiny else 5)
    return
  rng, position, found = np.random.default_rng(0), 0, []
  state = streaming.start(config)
  for place in places:
    text = rng.integers(0, config.vocab_size, (1, place - position), np.int32)
    start = time.perf_counter()
    piece = min(PIECE, places[0])
    state = streaming.extend(
      params, state, text, config=config, read_size=piece
    ).state
    jax.block_until_ready(state)
    reading = time.perf_counter() - start
    position = place
    row = _row(model, config, place) | {
      "tokens read": place,
      "reading s": reading,
      **_speed(params, config, state, 1 if tiny else BLOCKS),
    }
    found.append(row)
    yield row
  ratio = found[-1]["token ms"] / found[0]["token ms"]
  yield {
    "row": f"{model} {FAR}",
    "model": model,
    "place": FAR,
    "tokens read": position,
    "note": (
      f"not measured: {position:,} tokens were read, {FAR:,} were not;"
      " the same program runs there, on a state of the same size"
    ),
    "time at the last place, of the first": ratio,
  }


def _row(model: str, config: ModelConfig, place: int) -> Row:
  return {
    "row": f"{model} {place}",
    "model": model,
    "place": place,
    "state MiB": generation.state_bytes(config) / 2**20,
  }


def _speed(
  params: Any, config: ModelConfig, state: streaming.StreamState, blocks: int
) -> Row:
  """Speed of tokens one after the other: the median of blocks without the first
  one, which may compile.  `state` is unchanged."""
  states = jax.tree.map(lambda x: x[None], streaming.copy(state.fast))
  logits = state.logits
  keys, seconds = jax.random.split(jax.random.key(0), 1), []
  begin = time.perf_counter()
  while len(seconds) <= blocks:
    start = time.perf_counter()
    tokens, logits, states = generation.decode(
      params,
      states,
      logits,
      keys,
      config=config,
      count=generation.DECODE_STEPS,
      sampling=generation.Sampling(),
      vocab_size=config.vocab_size,
    )
    jax.block_until_ready(tokens)
    seconds.append(time.perf_counter() - start)
    if len(seconds) > 1 and time.perf_counter() - begin > SECONDS:
      break
  taken = statistics.median(seconds[1:]) / generation.DECODE_STEPS
  return {
    "blocks": len(seconds) - 1,
    "token ms": 1e3 * taken,
    "tokens/s": 1 / taken,
    "first block s": seconds[0],
  }


def _with_cache(
  params: Any,
  config: ModelConfig,
  model: str,
  places: Sequence[int],
  rounds: int,
) -> Iterator[Row]:
  for place in places:
    config = dataclasses.replace(config, context_length=place)
    speed = benchmark_generation.tokens_per_second(params, config, rounds)
    yield _row(model, config, place) | {
      "tokens read": 0,
      "token ms": 1e3 / speed,
      "tokens/s": speed,
      "note": "the cache counts as filled",
    }
