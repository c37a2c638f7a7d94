"""Multi-query associative recall (Arora et al. 2023, "Zoology").

A sequence of T tokens starts with P pairs, k1 v1 ... kP vP: distinct keys,
values drawn uniformly.  In the other T - 2P positions each key appears once
more, at a random position; the target there is its value, with weight 1.  All
other targets have weight 0.  Deviations from the paper: queries are at uniform
(not power-law) positions, with a filler token (not random ones) between them,
and the answer is never part of the input.

As in that paper, training may use problems of several sizes
(`data.mqar.train_pairs`): mixed, or in stages of `stage_examples` examples, of
which the last lasts for the rest of the run.  A row then holds num_pairs / size
problems of one size, each a document of its own, and so asks as many queries as
a row with one large problem.  valid and test have one problem of `num_pairs`.

Vocabulary: 0 filler, 1..num_keys keys, then num_values values.
"""

import dataclasses

import numpy as np

from hope_jax.config import ConfigError, DataConfig

FILLER = 0
EVAL_EXAMPLES = 1024  # in each of valid and test
_STREAMS = {"train": 0, "valid": 1, "test": 2}

Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Recall:
  """Examples of one split; number `index` depends on (seed, split, index)."""

  config: DataConfig
  split: str

  def __len__(self) -> int:
    return EVAL_EXAMPLES

  def __getitem__(self, index: int) -> Example:
    cfg = self.config
    rng = np.random.default_rng([cfg.seed, _STREAMS[self.split], index])
    if self.split != "train" or not cfg.mqar.train_pairs:
      return _problem(rng, cfg, cfg.mqar.num_pairs, cfg.sequence_length)
    if cfg.mqar.stage_examples:
      stage = min(
        index // cfg.mqar.stage_examples, len(cfg.mqar.train_pairs) - 1
      )
      pairs = cfg.mqar.train_pairs[stage]
    else:
      pairs = int(rng.choice(cfg.mqar.train_pairs))
    count = cfg.mqar.num_pairs // pairs
    length = cfg.sequence_length // count
    parts = [_problem(rng, cfg, pairs, length) for _ in range(count)]
    example = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
    numbers = np.arange(count, dtype=np.int32)
    return {**example, "segments": np.repeat(numbers, length)}


def _problem(
  rng: np.random.Generator, cfg: DataConfig, pairs: int, length: int
) -> Example:
  """Pairs, then their queries among fillers."""
  keys = 1 + rng.choice(cfg.mqar.num_keys, pairs, replace=False)
  values = 1 + cfg.mqar.num_keys + rng.integers(cfg.mqar.num_values, size=pairs)
  tokens = np.full(length, FILLER, np.int32)
  tokens[0 : 2 * pairs : 2] = keys
  tokens[1 : 2 * pairs : 2] = values
  # `choice` returns the positions in random order, which shuffles the queries.
  where = 2 * pairs + rng.choice(length - 2 * pairs, pairs, replace=False)
  tokens[where] = keys
  targets = np.zeros(length, np.int32)
  targets[where] = values
  weights = np.zeros(length, np.float32)
  weights[where] = 1.0
  return {"tokens": tokens, "targets": targets, "weights": weights}


def load(config: DataConfig, vocab_size: int) -> dict[str, Recall]:
  """Example sources of the three splits; `ConfigError` if impossible."""
  cfg = config.mqar
  pairs, keys, values = cfg.num_pairs, cfg.num_keys, cfg.num_values
  if pairs < 1 or values < 1:
    raise ConfigError(
      f"data.mqar.num_pairs={pairs} and data.mqar.num_values={values} must be"
      " positive"
    )
  if pairs > keys:
    raise ConfigError(
      f"data.mqar.num_pairs={pairs} needs as many distinct keys, but"
      f" data.mqar.num_keys={keys}"
    )
  if 3 * pairs > config.sequence_length:
    raise ConfigError(
      f"data.mqar.num_pairs={pairs} takes {3 * pairs} positions (pairs and"
      f" queries), but data.sequence_length={config.sequence_length}"
    )
  if cfg.stage_examples and not cfg.train_pairs:
    raise ConfigError(
      f"data.mqar.stage_examples={cfg.stage_examples} needs the sizes of the"
      " stages: set data.mqar.train_pairs, say 8,32"
    )
  for size in cfg.train_pairs:
    if pairs % size or config.sequence_length % (pairs // size):
      raise ConfigError(
        f"data.mqar.train_pairs={cfg.train_pairs}: {config.sequence_length}"
        f" tokens with {pairs} pairs do not divide into problems of {size}"
      )
  if 1 + keys + values > vocab_size:
    raise ConfigError(
      f"model.vocab_size={vocab_size} is too small for {keys} keys,"
      f" {values} values and a filler: set it to {1 + keys + values}"
    )
  return {split: Recall(config, split) for split in _STREAMS}
