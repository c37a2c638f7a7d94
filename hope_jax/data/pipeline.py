"""Batches by global step: a pure function of (seed, step), prefetched.

Batch = {"tokens", "targets": int32 [B, T], "weights": float32 [B, T]}, and
"segments", int32 [B, T], where examples hold several documents.
Step s of training takes examples s B .. (s + 1) B - 1 of an endless source,
so a run resumes from its step number alone, on any number of processes and
data workers.  Every process makes only its own rows of the global batch.

Legend: B batch, T tokens.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from hope_jax.config import Config, DataConfig
from hope_jax.data import lanes, mqar, records, text, tokenizer
from hope_jax.data import workers as workers_lib

Loader = Callable[[DataConfig, int], dict[str, Any]]


class Kind(NamedTuple):
  """A kind of data, `data.kind`.

  Attributes:
    load: (config, vocabulary size) -> sources of the splits.
    fingerprint: config -> hashes of the data; None: the data is generated.
    load_tokenizer: config -> the tokenizer of the data; None: there is none.
  """

  load: Loader
  fingerprint: Callable[[DataConfig], dict[str, str]] | None = None
  load_tokenizer: Callable[[DataConfig], tokenizer.Tokenizer] | None = None


KINDS = {
  "text": Kind(text.load, text.fingerprint, text.load_tokenizer),
  "records": Kind(records.load, records.fingerprint, records.load_tokenizer),
  "mqar": Kind(mqar.load),
}
PREFETCH = 8  # batches

Batch = dict[str, np.ndarray]


def load(config: Config) -> dict[str, Any]:
  """Split name -> source of examples; `ConfigError` for unusable data.

  The train split is endless.  With `train.carry_state`, row b of each step
  continues where row b of the step before ended.
  """
  records.check_alignment(config)
  kind = KINDS[config.data.kind]
  sources = kind.load(config.data, config.model.vocab_size)
  if config.train.carry_state:
    size, seed = config.data.batch_size, config.data.seed
    sources["train"] = lanes.Lanes(sources["in_order"], size, seed)
  return sources


def fingerprint(config: Config) -> dict[str, str]:
  """Hashes that verify that a run resumes on the same data; {} if it is
  generated.

  `content` covers all splits, `tokenizer` the tokenizer that made them.
  """
  of_kind = KINDS[config.data.kind].fingerprint
  return of_kind(config.data) if of_kind else {}


def load_tokenizer(config: Config) -> tokenizer.Tokenizer | None:
  """The tokenizer of the data; None for generated data."""
  of_kind = KINDS[config.data.kind].load_tokenizer
  return of_kind(config.data) if of_kind else None


@dataclasses.dataclass(frozen=True)
class TrainBatches:
  """Random access by step to rows `first .. last - 1` of the global batch."""

  source: Any
  batch_size: int
  rows: tuple[int, int]
  steps: int

  def __len__(self) -> int:
    return self.steps

  def __getitem__(self, step: int) -> Batch:
    start = step * self.batch_size
    return _stack([self.source[start + row] for row in range(*self.rows)])


def prefetch(
  batches: TrainBatches, start: int, workers: int = 0
) -> Iterator[Batch]:
  """Batches from step `start` on, made ahead in `workers` processes; with 0
  workers they are made on demand (`faults.with_timeout` asks ahead)."""
  if not workers:
    return (batches[step] for step in range(start, len(batches)))
  import grain

  source: Any = batches
  dataset = grain.MapDataset.source(source).slice(slice(start, None))
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)
  ahead = dataset.to_iter_dataset(options)
  if not flags.FLAGS.is_parsed():  # used as a library; grain's workers ask
    flags.FLAGS.mark_as_parsed()
  # Through pipes: nothing frees the shared memory of a process that was killed.
  through_pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
  ahead = grain.experimental.WithOptionsIterDataset(ahead, through_pipes)
  ahead = ahead.mp_prefetch(
    grain.MultiprocessingOptions(num_workers=workers),
    worker_init_fn=lambda index, count: workers_lib.follow_parent(),
  )
  return _in_processes(iter(ahead))


def _in_processes(ahead: Any) -> Iterator[Batch]:
  """`ahead`: the first element starts its processes, closing it ends them."""
  with contextlib.closing(ahead):
    with workers_lib.starting():
      batch = next(ahead, None)
    while batch is not None:
      yield batch
      batch = next(ahead, None)


def eval_batches(
  source: Any, batch_size: int, rows: tuple[int, int], limit: int = 0
) -> Iterator[Batch]:
  """One pass over a split, in order; the last batch is padded with weight 0.

  `limit` is the largest number of batches, 0 for the whole split.
  """
  count = -(-len(source) // batch_size)
  blank = {key: np.zeros_like(value) for key, value in source[0].items()}
  for batch in range(min(count, limit) if limit else count):
    indices = [batch * batch_size + row for row in range(*rows)]
    yield _stack([source[i] if i < len(source) else blank for i in indices])


def _stack(examples: list[Batch]) -> Batch:
  return {key: np.stack([e[key] for e in examples]) for key in examples[0]}
