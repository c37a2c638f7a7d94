"""The experiment runner, on a trainer that only pretends."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments import runner
from experiments.trials import ROOT, Evaluation, Trial, staged
from hope_jax.config import ConfigError

FAKE = pathlib.Path(__file__).with_name("fake_train.py")
BASE = Trial(
  group="text",
  row="hope",
  name="text/hope",
  config="configs/shakespeare.py",
  mode="hope",
  overrides={"train.log_every": 1},
)


def _runner(plan, out, **options) -> runner.Runner:
  if not callable(plan):
    trials = list(plan)
    plan = lambda _: trials  # noqa: E731
  return runner.Runner(
    plan,
    out,
    train=[sys.executable, str(FAKE), "train"],
    evaluate=[sys.executable, str(FAKE), "evaluate"],
    poll_seconds=0.02,
    **options,
  )


def _trial(name: str, **overrides) -> Trial:
  return dataclasses.replace(
    BASE, name=name, overrides={**BASE.overrides, **overrides}
  )


def _starts(out: pathlib.Path, name: str) -> list[float]:
  path = out / name / "starts.txt"
  return [float(t) for t in path.read_text().split()] if path.exists() else []


@pytest.fixture(autouse=True)
def import_from_root(monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_run_again_starts_nothing(tmp_path):
  trials = [_trial("a"), _trial("b")]
  assert _runner(trials, tmp_path).run() == 0
  assert _runner(trials, tmp_path).run() == 0
  assert len(_starts(tmp_path, "a")) == len(_starts(tmp_path, "b")) == 1


def test_run_starts_only_what_is_missing(tmp_path):
  assert _runner([_trial("a")], tmp_path).run() == 0
  assert _runner([_trial("a"), _trial("b")], tmp_path).run() == 0
  assert len(_starts(tmp_path, "a")) == len(_starts(tmp_path, "b")) == 1


def test_failing_trial_is_reported_and_the_others_run(tmp_path, capsys):
  trials = [_trial("bad", **{"opt.peak_lr": 0.5}), _trial("good")]
  experiment = _runner(trials, tmp_path)
  assert experiment.run() == 1
  bad, good = experiment.records()
  assert (bad.status, good.status) == (runner.FAILED, runner.DONE)
  assert "the loss is nan at step 3" in bad.message
  assert "FAILED  bad" in capsys.readouterr().out


def test_failed_trial_is_tried_again_by_the_next_run(tmp_path):
  trials = [_trial("bad", **{"opt.peak_lr": 0.5})]
  for attempts in (1, 2):
    assert _runner(trials, tmp_path).run() == 1
    assert len(_starts(tmp_path, "bad")) == attempts


def test_result_of_another_config_is_an_error_not_reused(tmp_path):
  assert _runner([_trial("a")], tmp_path).run() == 0
  changed = [_trial("a", **{"opt.peak_lr": 0.25})]
  experiment = _runner(changed, tmp_path)
  assert experiment.run() == 1
  (record,) = experiment.records()
  assert "another config" in record.message and record.result is None
  assert len(_starts(tmp_path, "a")) == 1


def test_result_on_another_mesh_is_reused(tmp_path):
  assert _runner([_trial("a")], tmp_path).run() == 0
  assert _runner([_trial("a", **{"mesh.fsdp": 2})], tmp_path).run() == 0
  assert len(_starts(tmp_path, "a")) == 1


def test_wrong_definition_fails_before_anything_runs(tmp_path):
  trials = [_trial("a"), _trial("b", **{"opt.peak_rl": 0.1})]
  with pytest.raises((ConfigError, KeyError), match="peak_rl"):
    _runner(trials, tmp_path).run()
  assert not _starts(tmp_path, "a")


def test_budget_stops_what_runs_and_lists_what_is_left(tmp_path, capsys):
  trials = [_trial("long", **{"train.steps": 7}), _trial("next")]
  start = time.monotonic()
  experiment = _runner(trials, tmp_path, budget=1.0)
  assert experiment.run() == 3
  assert time.monotonic() - start < 20
  assert [r.status for r in experiment.records()] == [runner.LEFT] * 2
  shown = capsys.readouterr().out
  assert "left    long" in shown and "left    next" in shown
  assert not _starts(tmp_path, "next")


@pytest.mark.parametrize("jobs", [1, 2])
def test_jobs_is_the_number_of_trials_at_a_time(tmp_path, jobs):
  trials = [_trial(name, **{"train.log_every": 60}) for name in "abc"]
  experiment = _runner(trials, tmp_path, jobs=jobs)
  most = 0

  def watch():
    nonlocal most
    while worker.is_alive():
      most = max(most, len(experiment._running))
      time.sleep(0.01)

  worker = threading.Thread(target=lambda: None)
  watcher = threading.Thread(target=watch)
  worker.start()
  worker.join()
  worker = threading.current_thread()
  stop = threading.Event()

  def watch_until_stopped():
    nonlocal most
    while not stop.is_set():
      most = max(most, len(experiment._running))
      time.sleep(0.01)

  watcher = threading.Thread(target=watch_until_stopped)
  watcher.start()
  try:
    assert experiment.run() == 0
  finally:
    stop.set()
    watcher.join()
  assert most == jobs
