"""The data group of the configuration."""

import dataclasses

from hope_jax.config.fields import check_choice, check_numbers


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What the model reads.

  Attributes:
    kind: `text` (files -> bytes), `records` (what scripts/prepare_data.py
      made), or `mqar` (generated recall).
    path: of text: a file or a comma-separated list of files, relative to the
      working folder; split by position into train / valid / test.  A folder
      holds `train.txt`, `valid.txt` and `test.txt`.  Of records: a folder or a
      comma-separated list of folders, valid and test from the first.
    tokenizer: of text: `bytes`, or a tokenizer's file (`data/tokenizer.py`).
    split: fractions of train and valid of a single file; the rest is test.
    weights: of the folders of records, in examples; empty: equal.
    long_share: share of examples with long documents (records prepared with
      --long); 0: as they come.
    workers: processes that read; 0: a thread.
    timeout: seconds to wait for a batch before the run ends with an error.
    sequence_length, batch_size: tokens per example, examples per step
      (global, over all processes).
    num_pairs, num_keys, num_values: MQAR's pairs per example and alphabet.
    train_pairs: sizes of the problems in MQAR's training, see `data/mqar.py`;
      empty: num_pairs.
    stage_examples: examples of each of train_pairs before the next one; 0: all
      sizes mixed from the start.
  """

  kind: str = "text"
  path: str = "hope_jax/data/tiny_shakespeare.txt"
  tokenizer: str = "bytes"
  split: tuple[float, ...] = (0.9, 0.05)
  sequence_length: int = 256
  batch_size: int = 8
  num_pairs: int = 8
  num_keys: int = 32
  num_values: int = 32
  train_pairs: tuple[int, ...] = ()
  stage_examples: int = 0
  weights: tuple[float, ...] = ()
  long_share: float = 0.0
  workers: int = 0
  timeout: float = 600.0
  seed: int = 0

  def __post_init__(self):
    check_choice(self.kind, "data.kind", ("text", "records", "mqar"))
    sizes = "sequence_length", "batch_size", "num_pairs"
    positive = (*sizes, "timeout", "weights", "train_pairs")
    check_numbers(self, "data", positive, ("long_share",))
