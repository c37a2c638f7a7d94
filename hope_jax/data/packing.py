"""Packs documents at aligned places into examples of one length.

A document of n tokens fills n - 1 places: a place holds a token and, as its
target, the next one.  Documents begin at multiples of `align` (the longest
memory chunk: docs/equations.md); the gap before them is padding.  A document
that does not fit continues in the next example.

Legend: T places of an example.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

Example = dict[str, np.ndarray]

# Besides tokens and targets: document number (0 continues the last document of
# the previous example, new ones count from 1), place in the document, loss
# weight.
FIELDS = {
  "segments": np.dtype(np.uint16),
  "positions": np.dtype(np.uint32),
  "weights": np.dtype(np.float16),
}
_MAX_DOCUMENTS = np.iinfo(FIELDS["segments"]).max


class Document(NamedTuple):
  """Tokens [n], and the loss weight of predicting each of them [n]."""

  tokens: np.ndarray
  weights: np.ndarray


def empty(length: int, token_dtype: np.dtype) -> Example:
  """An example of padding: token 0 without weight."""
  fields = {"tokens": token_dtype, "targets": token_dtype, **FIELDS}
  return {name: np.zeros(length, dtype) for name, dtype in fields.items()}


def pack(
  documents: Iterable[Document],
  length: int,
  align: int,
  token_dtype: np.dtype,
) -> Iterator[Example]:
  """Packs documents in their order; the last example is padded.

  Documents of fewer than two tokens have nothing to predict and are left out.
  """
  example, place, number = empty(length, token_dtype), 0, 0
  for document in documents:
    count = len(document.tokens) - 1
    if count < 1:
      continue
    start = -(-place // align) * align
    if place:  # padding belongs to the previous document
      example["segments"][place:start] = number
    place, number, done = start, number + 1, 0
    if place >= length or number > _MAX_DOCUMENTS:
      if number > _MAX_DOCUMENTS:
        example["segments"][place:] = number - 1
      yield example
      example, place, number = empty(length, token_dtype), 0, 1
    while done < count:
      if place == length:
        yield example
        example, place, number = empty(length, token_dtype), 0, 0
      size = min(count - done, length - place)
      here = slice(place, place + size)
      example["tokens"][here] = document.tokens[done : done + size]
      example["targets"][here] = document.tokens[done + 1 : done + 1 + size]
      example["weights"][here] = document.weights[done + 1 : done + 1 + size]
      example["segments"][here] = number
      example["positions"][here] = np.arange(done, done + size)
      place, done = place + size, done + size
  if place:
    example["segments"][place:] = number
    yield example
