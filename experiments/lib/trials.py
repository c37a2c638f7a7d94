"""Trials: what an experiment wants run, and the two-stage learning-rate sweep.

An experiment is a function `plan(results) -> list of trials`.  `results` maps
the names of finished trials to their result.json (None: the trial failed).
The runner calls it again whenever a trial ends, so a plan may grow: `sweep`
adds the other seeds of a row once its learning rate is chosen.
"""

import dataclasses
import importlib.util
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hope_jax.config import Config, ConfigError, MeshConfig, from_config_dict

ROOT = pathlib.Path(__file__).resolve().parents[2]

Results = Mapping[str, dict[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """One more evaluation of a trained model: flags of hope_jax.evaluate, or of
  another command of the package."""

  label: str
  flags: tuple[str, ...]
  command: str = "evaluate"


@dataclasses.dataclass(frozen=True)
class Trial:
  """One training run.

  Attributes:
    group, row: the table (say a data set) and the row it belongs to.
    name: its folder below the experiment's, unique.
    config, mode: `configs/shakespeare.py`, `hope`.
    overrides: config fields, `{"opt.peak_lr": 1e-3}`.
    seed: of the initial parameters and of the data order.
    evaluations: what to evaluate after training, besides the test split.
    is_final: whether it counts in the tables; trials of a rate grid do not.
  """

  group: str
  row: str
  name: str
  config: str
  mode: str
  overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
  seed: int = 0
  evaluations: tuple[Evaluation, ...] = ()
  is_final: bool = True

  def fields(self) -> dict[str, Any]:
    """All config fields that the trial sets."""
    seeds = {"train.seed": self.seed, "data.seed": self.seed}
    return {**self.overrides, **seeds}


Plan = Callable[[Results], Sequence[Trial]]


def resolve(trial: Trial) -> Config:
  """The trial's whole config; ConfigError, KeyError ... if it is wrong."""
  path = ROOT / trial.config
  spec = importlib.util.spec_from_file_location(path.stem, path)
  if spec is None or spec.loader is None or not path.exists():
    raise ConfigError(f"no config file {trial.config}")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(trial.mode)
  config.update_from_flattened_dict(trial.fields())
  return from_config_dict(config)


def _decisive(config: Config) -> Config:
  """`config` without what does not affect results: the mesh, and how often a
  run evaluates its validation loss and logs its dynamics."""
  train = dataclasses.replace(config.train, eval_every=0, dynamics_every=0)
  return dataclasses.replace(config, mesh=MeshConfig(), train=train)


def is_same(recorded: Mapping[str, Any], config: Config) -> bool:
  """Whether a run with the recorded config has the results of `config`."""
  try:
    old = from_config_dict(recorded)
  except ConfigError:  # recorded by another version
    return False
  return _decisive(old) == _decisive(config)


def best(trials: Sequence[Trial], results: Results) -> Trial | None:
  """The trial with the lowest VALIDATION loss; None while any is unfinished.

  A failed or diverged trial cannot win; if all failed there is no winner.
  """
  if any(trial.name not in results for trial in trials):
    return None
  losses = {}
  for trial in trials:
    result = results[trial.name]
    loss = result["valid_loss"] if result else math.nan
    if loss is not None and math.isfinite(loss):
      losses[trial.name] = loss
  return min(
    (trial for trial in trials if trial.name in losses),
    key=lambda trial: losses[trial.name],
    default=None,
  )


def slug(name: str) -> str:
  """A row's or group's name as part of a path: `Titans twin` -> titans_twin."""
  return name.lower().replace(" ", "_").replace("+", "p")


def variant(trial: Trial, rate: float, seed: int, **changes: Any) -> Trial:
  """`trial` at one peak learning rate and seed."""
  return dataclasses.replace(
    trial,
    name=f"{trial.name}/lr_{rate:g}-seed_{seed}",
    overrides={**trial.overrides, "opt.peak_lr": rate},
    seed=seed,
    **changes,
  )


def sweep(
  trial: Trial,
  results: Results,
  *,
  rates: Sequence[float],
  seeds: Sequence[int],
) -> tuple[list[Trial], list[Trial]]:
  """Two stages of `trial`: all `rates` on the first seed, then the other seeds.

  Returns (grid, chosen).  `chosen` is empty until the grid is done; then it
  holds one trial per seed at the best rate, the grid's own among them, and
  only these are final and carry `trial.evaluations`.
  """

  grid = [
    variant(trial, rate, seeds[0], evaluations=(), is_final=False)
    for rate in rates
  ]
  winner = best(grid, results)
  if winner is None:
    return grid, []
  rate = winner.overrides["opt.peak_lr"]
  return grid, [variant(trial, rate, seed) for seed in seeds]


def staged(
  rows: Sequence[Trial],
  *,
  rates: Sequence[float],
  seeds: Sequence[int],
) -> Plan:
  """The plan that sweeps every row, then repeats each at its best rate.

  Groups follow one another, so that an interrupted run has whole tables.
  """

  def plan(results: Results) -> list[Trial]:
    trials = {}
    for group in dict.fromkeys(row.group for row in rows):
      stages = [
        sweep(row, results, rates=rates, seeds=seeds)
        for row in rows
        if row.group == group
      ]
      for stage in (0, 1):  # a chosen trial replaces the grid's own
        for pair in stages:
          trials.update((trial.name, trial) for trial in pair[stage])
    return list(trials.values())

  return plan
