"""The data group of the configuration: one subgroup for every kind."""

import dataclasses
from typing import Literal

from hope_jax.config.fields import check


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """Texts as they are.

  Attributes:
    tokenizer: `bytes`, or a tokenizer's file (`data/tokenizer.py`).
    split: fractions of train and valid of a single file; the rest is test.
  """

  tokenizer: str = "bytes"
  split: tuple[float, ...] = (0.9, 0.05)

  def __post_init__(self):
    check(self, "data.text")


@dataclasses.dataclass(frozen=True)
class RecordsConfig:
  """What scripts/prepare_data.py made.

  Attributes:
    weights: of the folders, in examples; empty: equal.
    long_share: share of examples with long documents (of records prepared with
      --long); 0: as they come.
  """

  weights: tuple[float, ...] = ()
  long_share: float = 0.0

  def __post_init__(self):
    check(self, "data.records", ("weights",), ("long_share",))


@dataclasses.dataclass(frozen=True)
class MQARConfig:
  """Generated recall of key-value pairs (`data/mqar.py`).

  Attributes:
    num_pairs, num_keys, num_values: pairs per example, and their alphabet.
    train_pairs: sizes of the problems in training; empty: num_pairs.
    stage_examples: examples of each of train_pairs before the next one; 0: all
      sizes mixed from the start.
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
    kind: `text` (files), `records` (what scripts/prepare_data.py made), or
      `mqar` (generated recall).
    path: of text: a file or a comma-separated list of files, relative to the
      working folder; split by position into train / valid / test.  A folder
      holds `train.txt`, `valid.txt` and `test.txt`.  Of records: a folder or a
      comma-separated list of folders, valid and test from the first.
    sequence_length, batch_size: tokens per example, examples per step
      (global, over all processes).
    text, records, mqar: what concerns one kind only.
    workers: processes that read; 0: a thread.
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


# Field -> its subgroup: until November 2026 they lay in `data` itself, and so
# they do in runs and on command lines of that time.
OLD_NAMES = {
  field.name: group
  for group, config in (
    ("text", TextConfig),
    ("records", RecordsConfig),
    ("mqar", MQARConfig),
  )
  for field in dataclasses.fields(config)
}
