"""The experiment runner, on a trainer that only pretends."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.lib import runner
from experiments.lib.trials import ROOT, Evaluation, staged
from hope_jax.config import ConfigError
from tests.experiments.lib.faked import (
  BASE,
  FAKE,
  fake_runner,
  fake_trial,
  starts,
)


def test_run_again_starts_nothing(tmp_path):
  trials = [fake_trial("a"), fake_trial("b")]
  assert fake_runner(trials, tmp_path).run() == 0
  assert fake_runner(trials, tmp_path).run() == 0
  assert len(starts(tmp_path, "a")) == len(starts(tmp_path, "b")) == 1


def test_run_starts_only_what_is_missing(tmp_path):
  assert fake_runner([fake_trial("a")], tmp_path).run() == 0
  assert fake_runner([fake_trial("a"), fake_trial("b")], tmp_path).run() == 0
  assert len(starts(tmp_path, "a")) == len(starts(tmp_path, "b")) == 1


def test_failing_trial_is_reported_and_the_others_run(tmp_path, capsys):
  trials = [fake_trial("bad", **{"opt.peak_lr": 0.5}), fake_trial("good")]
  experiment = fake_runner(trials, tmp_path)
  assert experiment.run() == 1
  bad, good = experiment.records()
  assert (bad.status, good.status) == (runner.FAILED, runner.DONE)
  assert "the loss is nan at step 3" in bad.message
  assert "FAILED  bad" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("log", "reason"),
  [
    ("step 1\nerror: the loss is nan\n", "error: the loss is nan"),
    ("a.b.XlaRuntimeError: no memory\n---\nFor simplicity", "no memory"),
    ("KeyError: 1\nDuring handling ...\nOSError: disk full\n", "disk full"),
    ("step 1\nKilled\n", "Killed"),
    ("", "nothing"),
  ],
)
def test_last_error_finds_the_line_that_says_why(log, reason):
  assert reason in runner.last_error(log)


def test_failed_trial_is_tried_again_by_the_next_run(tmp_path):
  trials = [fake_trial("bad", **{"opt.peak_lr": 0.5})]
  for attempts in (1, 2):
    assert fake_runner(trials, tmp_path).run() == 1
    assert len(starts(tmp_path, "bad")) == attempts


def test_command_that_leaves_no_result_has_failed(tmp_path):
  experiment = fake_runner([fake_trial("a", **{"train.steps": 5})], tmp_path)
  assert experiment.run() == 1
  (record,) = experiment.records()
  assert record.status == runner.FAILED and "exit code 0" in record.message


def test_half_written_result_is_no_result(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "result.json").write_text('{"test_loss": 1.')
  assert fake_runner([fake_trial("a")], tmp_path).run() == 0
  assert len(starts(tmp_path, "a")) == 1


def test_commands_run_in_the_repository(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  experiment = fake_runner([fake_trial("a")], tmp_path)
  assert experiment.run() == 0
  (record,) = experiment.records()
  assert record.result is not None and record.result["cwd"] == str(ROOT)


def test_status_says_how_far_the_running_trials_are(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(runner, "STATUS_SECONDS", 0.0)
  (tmp_path / "a").mkdir()
  row = {"step": 3, "kind": "train", "loss": 2.5}
  (tmp_path / "a" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
  trials = [
    fake_trial("a", **{"train.steps": 9}),
    fake_trial("b"),
  ]  # b: no metrics yet
  assert fake_runner(trials, tmp_path, jobs=2).run() == 0
  assert "running a: step 3 of 9, loss 2.500" in capsys.readouterr().out


def test_result_of_another_config_is_an_error_not_reused(tmp_path):
  assert fake_runner([fake_trial("a")], tmp_path).run() == 0
  changed = [fake_trial("a", **{"opt.peak_lr": 0.25})]
  experiment = fake_runner(changed, tmp_path)
  assert experiment.run() == 1
  (record,) = experiment.records()
  assert "another config" in record.message and record.result is None
  assert len(starts(tmp_path, "a")) == 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"valid_loss": math.nan}, "whose valid_loss is no finite number"),
    ({"test_loss": math.inf}, "whose test_loss is no finite number"),
    ({"test_loss": "low"}, "whose test_loss is no finite number"),
    ({"config": None}, "another config"),
    ({"config": [1]}, "another config"),
  ],
)
def test_result_of_a_diverged_run_is_a_failure_not_a_result(
  tmp_path, change, message
):
  """Versions before wrote NaN; it is not trained again by itself."""
  off = Evaluation("off", ("--writes=off",))
  trial = dataclasses.replace(fake_trial("a"), evaluations=(off,))
  assert fake_runner([trial], tmp_path).run() == 0
  path = tmp_path / "a" / "result.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  experiment = fake_runner([trial], tmp_path)
  assert experiment.run() == 1
  (record,) = experiment.records()
  assert record.status == runner.FAILED and message in record.message
  assert record.result is None and not record.evaluations
  assert len(starts(tmp_path, "a")) == 1


def test_evaluation_that_is_not_finite_or_damaged_is_repeated(tmp_path):
  off = Evaluation("off", ("--writes=off",))
  trial = dataclasses.replace(fake_trial("a"), evaluations=(off,))
  assert fake_runner([trial], tmp_path).run() == 0
  path = tmp_path / "a" / "evaluate_off.json"
  good = path.read_text()
  scores = json.loads(good)
  for change in (scores | {"loss": math.nan}, {}, [], scores | {"step": None}):
    path.write_text(json.dumps(change))
    assert fake_runner([trial], tmp_path).run() == 0
    assert path.read_text() == good
  path.write_bytes(b"\xff")
  assert fake_runner([trial], tmp_path).run() == 0
  assert path.read_text() == good


def test_command_that_writes_something_else_is_a_failure(tmp_path):
  """It ends well, so that it would be started for ever."""
  trial = fake_trial("a")
  script = tmp_path / "other.py"
  script.write_text(
    "import pathlib, sys\n"
    "folder = [a for a in sys.argv if a.startswith('--workdir=')][0][10:]\n"
    "name = pathlib.Path(folder) / 'evaluate_off.json'\n"
    'name.write_text(\'{"step": 3, "loss": 1.0}\')\n'
  )
  assert fake_runner([trial], tmp_path).run() == 0
  off = Evaluation("off", ("--writes=off",))
  plan = [dataclasses.replace(trial, evaluations=(off,))]
  experiment = runner.Runner(
    lambda _: plan,
    tmp_path,
    command=lambda name: [sys.executable, str(script), name],
    poll_seconds=0.02,
  )
  assert experiment.run() == 1
  (record,) = experiment.records()
  assert "evaluate_off.json is not what was asked for" in record.message


def test_result_on_another_mesh_is_reused(tmp_path):
  assert fake_runner([fake_trial("a")], tmp_path).run() == 0
  assert fake_runner([fake_trial("a", **{"mesh.fsdp": 2})], tmp_path).run() == 0
  assert len(starts(tmp_path, "a")) == 1


def test_rows_run_alone(tmp_path):
  trials = [fake_trial("a"), dataclasses.replace(fake_trial("b"), row="titans")]
  assert fake_runner(trials, tmp_path, rows=["titans"]).run() == 0
  assert len(starts(tmp_path, "a")) == 0 and len(starts(tmp_path, "b")) == 1


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--rows=titan", "--rows: no row 'titan'; rows: hope"),
    ("--jobs=0", "--jobs=0 must be positive"),
    ("--budget=0", "--budget=0 must be positive"),
  ],
)
def test_wrong_flag_is_one_line(tmp_path, capsys, flag, message):
  plans = {"cpu": lambda: lambda _: [fake_trial("a")]}
  command = [f"--out={tmp_path}", flag]
  assert runner.main("none", plans, lambda *_: None, command) == 2
  assert capsys.readouterr().err == f"error: {message}\n"


def test_wrong_definition_fails_before_anything_runs(tmp_path):
  trials = [fake_trial("a"), fake_trial("b", **{"opt.peak_rl": 0.1})]
  with pytest.raises((ConfigError, KeyError), match="peak_rl"):
    fake_runner(trials, tmp_path).run()
  assert not starts(tmp_path, "a")


def test_budget_stops_what_runs_and_lists_what_is_left(tmp_path, capsys):
  trials = [fake_trial("long", **{"train.steps": 7}), fake_trial("next")]
  start = time.monotonic()
  experiment = fake_runner(trials, tmp_path, budget=1.0)
  assert experiment.run() == 3
  assert time.monotonic() - start < 20
  assert [r.status for r in experiment.records()] == [runner.LEFT] * 2
  shown = capsys.readouterr().out
  assert "left    long" in shown and "left    next" in shown
  assert not starts(tmp_path, "next")


def test_process_that_ignores_the_end_is_killed(tmp_path, monkeypatch):
  monkeypatch.setattr(runner, "GRACE_SECONDS", 0.2)
  trials = [fake_trial("deaf", **{"train.steps": 8})]
  experiment = fake_runner(trials, tmp_path, jobs=1, budget=1e-9)
  experiment._start_more()
  deadline = time.monotonic() + 60
  while not starts(tmp_path, "deaf") and time.monotonic() < deadline:
    time.sleep(0.05)
  (child,) = starts(tmp_path, "deaf")
  start = time.monotonic()
  assert experiment.run() == 3
  assert time.monotonic() - start < 30 and not _is_alive(child)


def test_budgets_exit_code_is_kept_beside_a_failure(tmp_path, monkeypatch):
  trials = [fake_trial("long", **{"train.steps": 7})]
  experiment = fake_runner(trials, tmp_path, budget=1e-9)
  failed = experiment.records()[0]._replace(status=runner.FAILED)
  monkeypatch.setattr(experiment, "records", lambda: [failed])
  assert experiment.run() == 3


def test_command_passes_its_flags_on_and_always_reports(tmp_path, monkeypatch):
  seen = {}

  class Fake:
    def __init__(self, plan, out, **options):
      seen.update(options, plan=plan, out=out)

    def run(self):
      return 3

    def records(self):
      return ["record"]

  monkeypatch.setattr(runner, "Runner", Fake)
  folders = [f"--out={tmp_path}", f"--report={tmp_path / 'report'}"]
  flags = [*folders, "--jobs=2", "--budget=5", "--rows=a,b", "--scale=gpu"]
  plans = {"cpu": lambda: "small", "gpu": lambda: "large"}
  report = lambda *given: seen.update(report=given)
  assert runner.main("none", plans, report, flags) == 3
  assert seen == {
    "plan": "large",
    "out": tmp_path,
    "jobs": 2,
    "budget": 5.0,
    "rows": ["a", "b"],
    "published": ROOT / "experiments/none/results/results.json",
    "report": (["record"], tmp_path / "report", "gpu"),
  }
  main = functools.partial(runner.main, "none", plans, report)
  assert main([*flags, "--fresh"]) == 3 and seen["published"] is None
  assert main(flags, folder="results_t2") == 3
  assert seen["published"].parent.name == "results_t2"


@pytest.mark.parametrize(("jobs", "expected"), [(1, [1, 1, 1]), (2, [1, 2, 2])])
def test_jobs_is_the_number_of_trials_at_a_time(tmp_path, jobs, expected):
  lengths = {"a": 60, "b": 250, "c": 60}  # c starts while b still runs
  trials = [
    fake_trial(name, **{"train.log_every": n}) for name, n in lengths.items()
  ]
  experiment = fake_runner(trials, tmp_path, jobs=jobs)
  assert experiment.run() == 0
  intervals = [r.result["interval"] for r in experiment.records()]
  running = [
    sum(start <= at < end for start, end in intervals) for at, _ in intervals
  ]
  assert sorted(running) == expected


def _is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_the_children_and_says_what_is_left(tmp_path, number):
  script = f"""
import pathlib, sys
from experiments.lib import runner, trials
trial = trials.Trial("t", "r", "long", "configs/shakespeare.py", "hope",
                     {{"train.steps": 7}})
experiment = runner.Runner(lambda _: [trial], pathlib.Path({str(tmp_path)!r}),
                           command=lambda name: [sys.executable,
                                                 {str(FAKE)!r}, name])
sys.exit(experiment.run())
"""
  process = subprocess.Popen(
    [sys.executable, "-c", script],
    stdout=subprocess.PIPE,
    text=True,
    cwd=ROOT,
  )
  try:
    deadline = time.monotonic() + 60
    while not starts(tmp_path, "long") and time.monotonic() < deadline:
      time.sleep(0.05)
    (child,) = starts(tmp_path, "long")
    process.send_signal(number)
    shown, _ = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 130
  assert "left    long" in shown
  assert not _is_alive(child)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_jobs_share_the_cores_without_overlap(monkeypatch, count):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 3, 5, 8})
  shares = [runner.core_share(slot, count) for slot in range(count)]
  assert sorted(core for share in shares for core in share) == [1, 2, 3, 5, 8]
  assert runner.core_share(7, jobs=8) == {1, 2, 3, 5, 8}


def test_paths_inside_the_repository_are_shown_from_its_root(tmp_path):
  assert runner.from_root(ROOT / "runs" / "x") == pathlib.Path("runs/x")
  assert runner.from_root(tmp_path) == tmp_path


def test_evaluations_run_once_after_training(tmp_path):
  off = Evaluation("off", ("--writes=off", "--level=memory"))
  trial = dataclasses.replace(fake_trial("a"), evaluations=(off,))
  for _ in range(2):
    experiment = fake_runner([trial], tmp_path)
    assert experiment.run() == 0
    (record,) = experiment.records()
    assert record.evaluations["off"]["level"] == "memory"
  log = (tmp_path / "a" / "log.txt").read_text()
  assert log.count("--writes=off") == 1
  assert log.count(" train --config=") == 1  # what came before is kept


def test_trial_without_its_evaluation_is_left(tmp_path):
  assert fake_runner([fake_trial("a")], tmp_path).run() == 0
  off = Evaluation("off", ("--writes=off",))
  trial = dataclasses.replace(fake_trial("a"), evaluations=(off,))
  (record,) = fake_runner([trial], tmp_path).records()
  assert record.status == runner.LEFT and record.result is not None


def test_evaluation_of_another_step_is_repeated(tmp_path):
  off = Evaluation("off", ("--writes=off",))
  trial = dataclasses.replace(fake_trial("a"), evaluations=(off,))
  assert fake_runner([trial], tmp_path).run() == 0
  path = tmp_path / "a" / "evaluate_off.json"
  scores = json.loads(path.read_text())
  path.write_text(json.dumps({**scores, "step": scores["step"] - 1}))
  assert fake_runner([trial], tmp_path).run() == 0
  assert json.loads(path.read_text()) == scores


def test_sweep_chooses_the_rate_on_validation_loss(tmp_path):
  off = Evaluation("off", ("--writes=off",))
  row = dataclasses.replace(BASE, evaluations=(off,))
  # Rate 0.5 fails; 0.002 is best on validation, 0.004 on test.
  plan = staged([row], rates=(0.001, 0.002, 0.004, 0.5), seeds=(0, 1, 2))
  experiment = fake_runner(plan, tmp_path, jobs=2)
  assert experiment.run() == 1  # the failed trial
  records = {r.trial.name: r for r in experiment.records()}
  assert len(records) == 6
  final = [r for r in records.values() if r.trial.is_final]
  assert {r.trial.overrides["opt.peak_lr"] for r in final} == {0.002}
  assert sorted(r.trial.seed for r in final) == [0, 1, 2]
  assert all("off" in r.evaluations for r in final)
  grid = [r for r in records.values() if not r.trial.is_final]
  assert not any(r.evaluations for r in grid)
  assert json.loads(
    (tmp_path / "text/hope/lr_0.002-seed_2/result.json").read_text()
  )["test_loss"] == pytest.approx(1.9)
