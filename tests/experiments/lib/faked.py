"""Trials of the trainer that only pretends, fake_train.py, and their runner."""

import dataclasses
import pathlib
import sys

from experiments.lib import runner
from experiments.lib.trials import Trial

FAKE = pathlib.Path(__file__).with_name("fake_train.py")
BASE = Trial(
  group="text",
  row="hope",
  name="text/hope",
  config="configs/shakespeare.py",
  mode="hope",
  overrides={"train.log_every": 1},
)


def fake_runner(plan, out: pathlib.Path, **options) -> runner.Runner:
  """Of a plan, or of trials."""
  if not callable(plan):
    trials = list(plan)
    plan = lambda _: trials
  return runner.Runner(
    plan,
    out,
    command=lambda name: [sys.executable, str(FAKE), name],
    poll_seconds=0.02,
    **options,
  )


def fake_trial(name: str, **overrides) -> Trial:
  return dataclasses.replace(
    BASE, name=name, overrides={**BASE.overrides, **overrides}
  )


def starts(out: pathlib.Path, name: str) -> list[int]:
  """Process ids, one per start of the trial."""
  path = out / name / "starts.txt"
  return [int(pid) for pid in path.read_text().split()] if path.exists() else []
