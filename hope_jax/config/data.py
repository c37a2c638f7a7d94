"""The data group of the configuration, with a subgroup for each kind."""

import dataclasses
from typing import Literal

from hope_jax.config.fields import check


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """Text files, read without preparation.

  Attributes:
    tokenizer: `bytes`, or the path of a tokenizer file (`data/tokenizer.py`).
    split: shares of train and valid where `data.path` names files; the rest is
      test.
  """

  tokenizer: str = "bytes"
  split: tuple[float, ...] = (0.9, 0.05)

  def __post_init__(self):
    check(self, "data.text")


@dataclasses.dataclass(frozen=True)
class RecordsConfig:
  """Data prepared by scripts/prepare_data.py.

  Attributes:
    weights: relative numbers of training examples from each folder; empty:
      equal.
    long_share: share of training examples from the group of long documents
      (needs data prepared with --long); 0: the group's share of the data.
  """

  weights: tuple[float, ...] = ()
  long_share: float = 0.0

  def __post_init__(self):
    check(self, "data.records", ("weights",), ("long_share",))


@dataclasses.dataclass(frozen=True)
class MQARConfig:
  """Generated recall of key-value pairs (`data/mqar.py`).

  Attributes:
    num_pairs, num_keys, num_values: pairs per example; numbers of different
      keys and values.
    train_pairs: numbers of pairs in the problems of training; empty: num_pairs.
    stage_examples: examples of each size in train_pairs before the next size
      begins; 0: all sizes are mixed from the start.
  """

  num_pairs: int = 8
  num_keys: int = 32
  num_values: int = 32
  train_pairs: tuple[int, ...] = ()
  stage_examples: int = 0

  def __post_init__(self):
    check(self, "data.mqar", ("num_pairs", "train_pairs"))


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What the model reads.

  Attributes:
    kind: `text` (files), `records` (prepared by scripts/prepare_data.py), or
      `mqar` (generated recall).
    path: for text, a file or a comma-separated list of files, which are joined
      and split by position into train / valid / test; or a folder with
      `train.txt`, `valid.txt` and `test.txt`.  For records, a folder or a
      comma-separated list of folders; valid and test are the first folder's.
      Relative paths start at the working folder or, for text that is not
      there, at the repository's root.
    sequence_length, batch_size: tokens per example, examples per step
      (global, over all processes).
    text, records, mqar: the fields of one kind only.
    workers: number of processes that read; 0: a thread reads.
    timeout: seconds to wait for a batch before the run ends with an error.
  """

  kind: Literal["text", "records", "mqar"] = "text"
  path: str = "hope_jax/data/tiny_shakespeare.txt"
  sequence_length: int = 256
  batch_size: int = 8
  text: TextConfig = TextConfig()
  records: RecordsConfig = RecordsConfig()
  mqar: MQARConfig = MQARConfig()
  workers: int = 0
  timeout: float = 600.0
  seed: int = 0

  def __post_init__(self):
    check(self, "data", ("sequence_length", "batch_size", "timeout"))

  @property
  def is_generated(self) -> bool:
    """Whether examples are generated, not read from documents."""
    return self.kind not in ("text", "records")


# Field -> its subgroup.  Until November 2026 these fields were in `data`
# itself, and they still are in runs and on command lines of that time.
OLD_NAMES = {
  field.name: group
  for group, config in (
    ("text", TextConfig),
    ("records", RecordsConfig),
    ("mqar", MQARConfig),
  )
  for field in dataclasses.fields(config)
}
