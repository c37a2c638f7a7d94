"""A published results.json in the place of the trials' folders."""

import dataclasses
import json

import pytest

from experiments.lib import results, runner
from experiments.lib.results import DONE, FAILED, LEFT
from experiments.lib.trials import Evaluation, Trial, staged
from tests.experiments.lib.faked import BASE, fake_runner, fake_trial, starts

OFF = Evaluation("off", ("--writes=off",))
TRIAL = dataclasses.replace(fake_trial("a"), evaluations=(OFF,))


@pytest.fixture
def published(tmp_path):
  """What TRIAL leaves for another machine."""
  here = tmp_path / "here"
  experiment = fake_runner([TRIAL], here)
  assert experiment.run() == 0
  path = tmp_path / "published" / "results.json"
  results.write(path, "x", experiment.records())
  return path


def changed(trial: Trial = TRIAL, **overrides) -> Trial:
  return dataclasses.replace(trial, overrides=TRIAL.overrides | overrides)


def test_published_trial_is_done_elsewhere_and_not_run_again(
  tmp_path, published
):
  there = tmp_path / "there"
  trials = [TRIAL, fake_trial("b")]
  experiment = fake_runner(trials, there, published=published)
  assert [r.status for r in experiment.records()] == [DONE, LEFT]
  assert experiment.run() == 0
  assert not (there / "a").exists() and len(starts(there, "b")) == 1
  first = experiment.records()[0]
  (before,) = fake_runner([TRIAL], tmp_path / "here").records()
  assert (first.result, first.evaluations) == (
    before.result,
    before.evaluations,
  )
  assert (first.curves, first.origin) == (before.curves, before.origin)
  assert first.curves[results.TRAIN] == ([1, 2], [3.0, 2.5])
  # The trial as planned, whose flags the file does not have.
  assert first.trial == TRIAL and first.status == DONE


def test_published_results_choose_the_rate_of_a_sweep(tmp_path):
  plan = staged([BASE], rates=(0.001, 0.002), seeds=(0, 1))
  experiment = fake_runner(plan, tmp_path / "here")
  assert experiment.run() == 0
  path = tmp_path / "results.json"
  results.write(path, "x", experiment.records())
  again = fake_runner(plan, tmp_path / "there", published=path).records()
  assert [r.status for r in again] == [DONE] * 3
  assert {r.trial.overrides["opt.peak_lr"] for r in again if r.trial.seed} == {
    0.002
  }


def test_published_result_of_another_config_is_refused(tmp_path, published):
  there = tmp_path / "there"
  trial = changed(**{"opt.peak_lr": 0.25})
  experiment = fake_runner([trial], there, published=published)
  assert experiment.run() == 1
  (record,) = experiment.records()
  assert record.status == FAILED and record.result is None
  assert record.message == (
    f"{published} holds the result of another config: --fresh trains it again"
  )
  assert not starts(there, "a")
  assert fake_runner([trial], there).run() == 0  # as --fresh does


@pytest.mark.parametrize("change", [{"mode": "hope,smoke"}, {"name": "b"}])
def test_trial_of_another_name_or_mode_is_another(tmp_path, published, change):
  trial = dataclasses.replace(TRIAL, **change)
  (record,) = fake_runner([trial], tmp_path, published=published).records()
  assert record.status == LEFT


def test_own_folder_goes_before_the_published_result(tmp_path, published):
  there = tmp_path / "there"
  assert fake_runner([TRIAL], there).run() == 0
  path = there / "a" / "result.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"test_loss": 9.0}))
  (record,) = fake_runner([TRIAL], there, published=published).records()
  assert record.result is not None and record.result["test_loss"] == 9.0


@pytest.mark.parametrize("is_stale", [False, True])
def test_published_trial_without_an_evaluation_is_trained_again(
  tmp_path, published, is_stale, capsys
):
  there, trial = tmp_path / "there", TRIAL
  if is_stale:  # of a model in the midst of its training
    text = published.read_text()
    assert '"step":150' in text
    published.write_text(text.replace('"step":150', '"step":9'))
  else:
    more = Evaluation("off_memory", ("--writes=off", "--level=memory"))
    trial = dataclasses.replace(TRIAL, evaluations=(OFF, more))
  experiment = fake_runner([trial], there, published=published)
  (record,) = experiment.records()
  assert record.status == LEFT and record.result is None
  assert experiment.run() == 0
  assert len(starts(there, "a")) == 1
  (record,) = experiment.records()
  assert record.status == DONE and record.workdir == there / "a"
  assert set(record.evaluations) == {e.label for e in trial.evaluations}
  said = f"{published} lacks an evaluation of it, which needs the model"
  assert capsys.readouterr().out.count(said) == 1


def test_damaged_file_is_said_before_anything_runs(tmp_path, capsys):
  def fail(*args):
    raise AssertionError("begun before all was checked")

  (tmp_path / "results.json").write_text("<<<<<<< HEAD")
  plans = {"cpu": fail}
  folder = f"--out={tmp_path}"
  assert runner.main("x", plans, fail, [folder], fail) == 2
  assert "results.json is not JSON" in capsys.readouterr().err
