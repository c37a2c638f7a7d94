"""Examples in an order in which each row of a batch continues its text.

The examples, in the order of their documents, are cut into as many lanes as a
batch has rows: row b reads lane b from its beginning to its end.  The cut is at
a new place in every epoch.

Legend: B rows of a batch.
"""

import functools
from typing import Any

import numpy as np

from hope_jax.config import ConfigError

Example = dict[str, np.ndarray]


class Lanes:
  """An endless source: example `s B + b` is lane b's example at step s.

  Where a lane begins or the examples start over, the first document does not
  continue the row's last example, so it gets a number of its own.
  """

  def __init__(self, examples: Any, batch_size: int, seed: int):
    self._examples, self._rows, self._seed = examples, batch_size, seed
    self._steps = len(examples) // batch_size  # of an epoch
    if not self._steps:
      raise ConfigError(
        f"data.batch_size={batch_size} with train.carry_state needs as many"
        f" examples, the train split has {len(examples)}"
      )
    self._offset = functools.lru_cache(maxsize=2)(self._draw_offset)

  def __reduce__(self):
    return Lanes, (self._examples, self._rows, self._seed)

  def _draw_offset(self, epoch: int) -> int:
    rng = np.random.default_rng([self._seed, epoch])
    return int(rng.integers(len(self._examples)))

  def __getitem__(self, index: int) -> Example:
    step, row = divmod(index, self._rows)
    epoch, place = divmod(step, self._steps)
    number = self._offset(epoch) + row * self._steps + place
    example = dict(self._examples[number % len(self._examples)])
    segments = example.get("segments", np.zeros_like(example["tokens"]))
    is_first = place == 0 or number % len(self._examples) == 0
    example["segments"] = segments + np.int32(is_first)
    return example
