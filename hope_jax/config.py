"""Frozen configuration dataclasses, made from a ConfigDict (`fields.py`).

`configs/*.py` return an `ml_collections.ConfigDict` with the groups
`model / opt / data / mesh / train / eval` (the first in `model_config.py`).  It
is converted once, at the boundary, by `from_config_dict`; unknown fields and
wrong types raise a one-line `ConfigError`.
"""

import dataclasses
from typing import Any

from hope_jax.fields import ConfigError, check_choice, check_numbers, convert
from hope_jax.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class OptConfig:
  """AdamW with warm-up, cosine decay and two learning-rate groups.

  Attributes:
    peak_lr, end_lr_ratio: cosine from peak_lr to end_lr_ratio * peak_lr.
    warmup_steps: linear from 0.
    memory_lr_ratio: rate of the memories' initial states and gates relative
      to the rest.
    clip_norm: global norm of the gradient; 0 does not clip.
  """

  peak_lr: float = 1e-3
  end_lr_ratio: float = 0.1
  warmup_steps: int = 50
  weight_decay: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  clip_norm: float = 1.0
  memory_lr_ratio: float = 1.0

  def __post_init__(self):
    check_numbers(self, "opt", ("peak_lr", "eps"), ("b1", "b2"))


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


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices per axis; -1 takes what is left (one axis at the most)."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop: length, logging, checkpoints.

  Attributes:
    accumulate: parts that a batch is cut into, one after the other.
    init_from: folder of an export (hope_jax.export) with the parameters to
      begin with; empty: random ones.
    carry_state: a document that goes on in the next step finds the memories
      as it left them (truncated backpropagation through time).
    keep_checkpoints, keep_best: how many of the newest checkpoints are kept,
      and of those with the lowest validation loss.
    max_bad_steps: so many steps in a row without a finite loss and gradient
      end the run; fewer are skipped.
    rollback_factor: a logged loss above so many times the median of the last
      50 sends the run back to its last checkpoint, past the data in between;
      0: never.  max_rollbacks: more than so many end the run.
    hang_seconds: a step that takes longer dumps all stacks on stderr; 0: off.
  """

  steps: int = 500
  seed: int = 0
  accumulate: int = 1
  init_from: str = ""
  carry_state: bool = False
  log_every: int = 10
  dynamics_every: int = 100
  eval_every: int = 100
  checkpoint_every: int = 100
  keep_checkpoints: int = 2
  keep_best: int = 0
  max_bad_steps: int = 10
  rollback_factor: float = 0.0
  max_rollbacks: int = 3
  hang_seconds: float = 1800.0
  wandb: str = "off"
  wandb_project: str = "hope_jax"

  def __post_init__(self):
    counts = "steps", "accumulate", "keep_checkpoints", "max_bad_steps"
    check_numbers(self, "train", counts)
    if self.rollback_factor and self.rollback_factor <= 1:
      raise ConfigError(
        f"train.rollback_factor={self.rollback_factor} must be above 1, or 0"
        " (never)"
      )
    check_choice(self.wandb, "train.wandb", ("off", "offline", "online"))


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Held-out evaluation: `batches` of `batch_size`; 0 is the whole split."""

  batches: int = 0
  batch_size: int = 8

  def __post_init__(self):
    check_numbers(self, "eval", ("batch_size",))


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything of one run."""

  model: ModelConfig = ModelConfig()
  opt: OptConfig = OptConfig()
  data: DataConfig = DataConfig()
  mesh: MeshConfig = MeshConfig()
  train: TrainConfig = TrainConfig()
  eval: EvalConfig = EvalConfig()

  def __post_init__(self):
    if self.data.batch_size % self.train.accumulate:
      raise ConfigError(
        f"train.accumulate={self.train.accumulate} does not divide"
        f" data.batch_size={self.data.batch_size}"
      )
    carries = self.train.carry_state
    is_cache = self.model.has_longest_context
    if carries and (is_cache or self.data.kind == "mqar"):
      raise ConfigError(
        f"train.carry_state: {self.model.sequence_layer} on {self.data.kind}"
        " has nothing to carry; it is for memories on documents"
      )
    is_short = self.model.context_length < self.data.sequence_length
    if self.model.cms.signal == "next_token" and is_cache and is_short:
      raise ConfigError(
        f"data.sequence_length={self.data.sequence_length} is longer than"
        f" attention's cache: raise model.context_length"
        f" ({self.model.context_length})"
      )
    self._check_levels()

  def _check_levels(self):
    cms, length = self.model.cms, self.data.sequence_length
    tokens = self.data.batch_size * length
    if cms.step_tokens not in (0, tokens):
      raise ConfigError(
        f"model.cms.step_tokens={cms.step_tokens} must be"
        f" data.batch_size={self.data.batch_size} times"
        f" data.sequence_length={length}, {tokens}, or 0 (no level is slower"
        " than a training step)"
      )
    longest = max((1, *cms.periods.values()))
    if longest > self.train.steps:
      raise ConfigError(
        f"model.cms.chunk_lengths has {longest * tokens}, which is"
        f" {longest} training steps: such a level never changes in"
        f" train.steps={self.train.steps}; shorten it, or train longer"
      )
    slowest = max((0, *cms.fast_lengths))
    if slowest * 2 > length and not self.train.carry_state:
      hint = ""
      if slowest >= tokens and not cms.step_tokens:
        hint = f"; or model.cms.step_tokens={tokens}: the optimizer changes it"
      raise ConfigError(
        f"model.cms.chunk_lengths has {slowest}, more than half of"
        f" data.sequence_length={length}: such a level hardly uses what it"
        f" learns; shorten it, or train.carry_state{hint}"
      )


def from_config_dict(config_dict: Any) -> Config:
  """ConfigDict (or nested mapping) -> `Config`; raises `ConfigError`."""
  return convert(Config, config_dict)


def to_dict(config: Any) -> dict[str, Any]:
  """`Config` -> nested plain dict (JSON-ready), inverse of the above."""
  return dataclasses.asdict(config)
