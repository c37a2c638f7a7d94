"""What a long stream, and what a literal setting, does to a model's state.

`measure` reads four streams at once (`reading.STREAMS`): one repeated token,
uniform noise, a text, and the same text with another passage of 16 tokens at
its start.  `measure_literal` reads a text chunk by chunk with some of the
defaults of `MemoryConfig` set to what the paper's formulas say.

Legend: B streams, P pieces, R tokens, V vocab.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from experiments.stability import reading
from experiments.stability.reading import STREAMS, Measured, Source

DISTANCE = 4096  # tokens from the changed passage to the compared logits
PIECE = 4096  # tokens read at once
LARGE = 1e6  # a state above it has blown up

# Literal settings, one at a time and together: fields of MemoryConfig.
LITERAL: dict[str, dict[str, Any]] = {
  "momentum=sum": {"momentum": "sum"},
  "step_scale=sum": {"step_scale": "sum"},
  "loss_factor=1": {"loss_factor": 1.0},
  "delta_rule=literal": {"delta_rule": "literal"},
  "retention=zero": {"retention": "zero"},
  "proximal=False": {"proximal": False},
  "error_clip=0": {"error_clip": 0.0},
  "setting=chunk_l2": {"setting": "chunk_l2"},
  "target_clip=0": {"target_clip": 0.0},
}


def _together(left_out: str | None = None) -> dict[str, Any]:
  """All literal settings, or all but one, as fields of MemoryConfig."""
  return {
    key: x
    for name, fields in LITERAL.items()
    for key, x in fields.items()
    if name != left_out
  }


VARIANTS: dict[str, dict[str, Any]] = {
  "defaults": {},
  **LITERAL,
  "all": _together(),
  **{f"all but {name}": _together(name) for name in LITERAL},
}


def number(x: Any) -> float | None:
  """A number for JSON: 5 digits, None where it is not finite."""
  return float(f"{x:.5g}") if math.isfinite(x) else None


def _largest(measured: Measured) -> np.ndarray:
  """Largest |D| or |S| of any level after every piece [P, B]."""
  return np.maximum.reduce(list(measured.size.values()))


def _growth(largest_P: np.ndarray) -> float:
  """Largest state in a stream's second half over that in its first; infinite
  if one of them is."""
  half = max(1, len(largest_P) // 2)
  if not np.isfinite(largest_P).all():
    return math.inf
  first, second = largest_P[:half].max(), largest_P[half:].max(initial=0.0)
  return second / first if first else 1.0


def _stream(
  measured: Measured, row: int, levels: tuple[str, ...]
) -> dict[str, Any]:
  largest = _largest(measured)[:, row]
  return {
    "logits_finite": bool(measured.logits_finite[:, row].all()),
    "state_finite": bool(measured.state_finite[:, row].all()),
    "max_state": number(largest.max()),
    "growth": number(_growth(largest)),
    "moved": {name: number(measured.moved[name][-1, row]) for name in levels},
  }


def measure(
  source: Source,
  text: np.ndarray,
  *,
  chunk_length: int,
  dtype: str,
  count: int,
) -> dict[str, Any]:
  """All streams of `count` tokens through one model.

  Returns per stream whether logits and state stayed finite, the largest
  |D|, |S|, its growth from the first to the second half of the stream and
  |D| / |M_0| at the end; and `change`, |a - b| / |b| of the logits
  `distance` tokens after the changed passage (`change_median`: median over
  the tokens from there to the piece's end).
  """
  config = reading.with_chunk(source.config, chunk_length)
  config = dataclasses.replace(config, dtype=dtype)
  tokens = reading.streams(text, count, config.vocab_size)
  is_long = count >= DISTANCE + reading.PASSAGE
  distance = DISTANCE if is_long else count // 2
  measured, logits_BRV = reading.read(
    source.params,
    tokens,
    config=config,
    piece=min(PIECE, count // 2),
    at=reading.PASSAGE - 1 + distance,
  )
  assert logits_BRV is not None
  real, changed = (
    logits_BRV[STREAMS.index(name)] for name in ("text", "changed")
  )
  change_R = np.linalg.norm(changed - real, axis=-1)
  change_R = change_R / np.linalg.norm(real, axis=-1)
  return {
    "model": source.model,
    "weights": source.weights,
    "dtype": dtype,
    "chunk_length": chunk_length,
    "tokens": count,
    "streams": {
      name: _stream(measured, row, config.fast_levels)
      for row, name in enumerate(STREAMS)
    },
    "distance": distance,
    "change": number(change_R[0]),
    "change_median": number(np.median(change_R)),
  }


def _first(flags_P: np.ndarray) -> int | None:
  """Number, from 1, of the first piece for which the flag is set."""
  return int(np.argmax(flags_P)) + 1 if flags_P.any() else None


def measure_literal(
  source: Source,
  text: np.ndarray,
  *,
  variant: str,
  chunk_length: int,
  chunks: int,
) -> dict[str, Any]:
  """`chunks` memory chunks of a text with the settings of a variant.

  Returns the first chunk (from 1) after which something is not finite, the
  first with a state above LARGE, the largest state while it was finite, and
  the level that was largest one chunk before it failed, or else at the end.
  """
  config = reading.with_chunk(source.config, chunk_length)
  memory = dataclasses.replace(config.memory, **VARIANTS[variant])
  config = dataclasses.replace(config, memory=memory)
  count = chunks * chunk_length
  tokens = reading.streams(text, count, config.vocab_size)
  row = STREAMS.index("text")
  measured, _ = reading.read(
    source.params, tokens[row : row + 1], config=config, piece=chunk_length
  )
  is_finite = (measured.state_finite & measured.logits_finite)[:, 0]
  largest = _largest(measured)[:, 0]
  nonfinite, large = _first(~is_finite), _first(largest > LARGE)
  failure = min(nonfinite or chunks + 1, large or chunks + 1)
  before = max(0, failure - 2)
  size = {name: x[before, 0] for name, x in measured.size.items()}
  return {
    "model": source.model,
    "variant": variant,
    "chunk_length": chunk_length,
    "chunks": chunks,
    "first_nonfinite": nonfinite,
    "first_large": large,
    "max_state": number(largest.max(where=largest < np.inf, initial=0.0)),
    "growth": number(_growth(largest)),
    "level": max(size, key=lambda name: size[name]),
  }
