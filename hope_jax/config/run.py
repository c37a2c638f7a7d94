"""The whole configuration of a run, and its mesh, train and eval groups."""

import dataclasses
import typing
from typing import Any, Literal

from hope_jax.config.data import OLD_NAMES, DataConfig
from hope_jax.config.fields import ConfigError, check, convert
from hope_jax.config.model import ModelConfig
from hope_jax.config.optimizer import OptConfig


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices per axis; -1, for one axis at most, takes the remaining ones."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop: length, logging, checkpoints.

  Attributes:
    accumulate: number of microbatches per step, computed one after the other.
    init_from: folder of an export (hope_jax.export) with the initial
      parameters; empty: they are drawn at random.
    carry_state: whether a document that continues in the next step keeps its
      fast state (truncated backpropagation through time).
    keep_checkpoints, keep_best: how many checkpoints are kept of the newest
      ones, and of those with the lowest validation loss.
    max_bad_steps: the run ends after this many consecutive steps whose loss or
      gradient is not finite; until then such steps are skipped.
    rollback_factor: a logged loss above this multiple of the median of the last
      50 sends the run back to its last checkpoint, and the data in between is
      skipped; 0: never.
    max_rollbacks: the run ends after more rollbacks than this.
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
  wandb: Literal["off", "offline", "online"] = "off"
  wandb_project: str = "hope_jax"

  def __post_init__(self):
    counts = "steps", "accumulate", "keep_checkpoints", "max_bad_steps"
    check(self, "train", counts)
    if self.rollback_factor and self.rollback_factor <= 1:
      raise ConfigError(
        f"train.rollback_factor={self.rollback_factor} must be above 1, or 0"
        " (never)"
      )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Held-out evaluation on `batches` batches; 0: the whole split."""

  batches: int = 0
  batch_size: int = 8

  def __post_init__(self):
    check(self, "eval", ("batch_size",))


@dataclasses.dataclass(frozen=True)
class Config:
  """The whole configuration of one run."""

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
    if carries and (is_cache or self.data.is_generated):
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
  """ConfigDict (or nested mapping) -> `Config`; raises `ConfigError`.

  Fields of the data group may be in their old place (`OLD_NAMES`), which takes
  precedence: if both are given, the old one is the command line's and the new
  one the config file's.
  """
  return convert(Config, _with_new_names(config_dict))


def _with_new_names(values: Any) -> Any:
  """Moves fields from their old place to their subgroup; keeps the rest."""
  data = values.get("data") if hasattr(values, "items") else None
  if not hasattr(data, "items"):
    return values
  data = dict(typing.cast(Any, data).items())
  for name in OLD_NAMES.keys() & data.keys():
    group = OLD_NAMES[name]
    data[group] = {**data.get(group, {}), name: data.pop(name)}
  return {**values, "data": data}


def to_dict(config: Any) -> dict[str, Any]:
  """`Config` -> nested plain dict (JSON-ready); inverts `from_config_dict`."""
  return dataclasses.asdict(config)
