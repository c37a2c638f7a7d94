"""Ablations and context usage: plans and tables."""

import pytest

from experiments.ablations import run as ablations
from experiments.context_usage import run as context_usage
from experiments.lib.results import DONE, LEFT, Record
from experiments.lib.trials import resolve


@pytest.mark.parametrize("scale", ["cpu", "all", "smoke"])
def test_rows_differ_from_hope_in_their_own_fields(scale):
  trials = ablations.PLANS[scale]()({})
  assert len({trial.name for trial in trials}) == len(trials)
  for trial in trials:
    resolve(trial)
    own = ablations.ALL_ROWS[trial.row].overrides
    assert len(own) == (trial.row != "Hope")
    (hope,) = (
      t
      for t in trials
      if (t.row, t.group, t.seed) == ("Hope", trial.group, trial.seed)
    )
    assert trial.overrides == {**hope.overrides, **own}


def test_context_usage_reads_the_models_of_the_ablations():
  trained = {t.name: t for t in ablations.PLANS["cpu"]()({})}
  read = context_usage.PLANS["cpu"]()({})
  titans = {t.name for t in read if "titans" in t.mode}
  assert {t.name for t in read} - set(trained) == titans
  assert len(titans) == 6
  for trial in read:
    resolve(trial)
    if trial.name in trained:
      assert trial.overrides == trained[trial.name].overrides


def record(trial, loss, accuracy=0.5):
  result = {"test_loss": loss, "accuracy": accuracy, "parameters": 7}
  scores = {"loss": loss + 1, "accuracy": 0.0}
  curve = [{"end": 64, "loss": loss}, {"end": 128, "loss": loss - 1}]
  evaluations = {
    e.label: {**scores, "by_position": curve} for e in trial.evaluations
  }
  return Record(trial, DONE, result, evaluations, "", None)


def test_table_has_perplexity_beside_recall():
  trials = ablations.PLANS["cpu"]()({})
  losses = {0: 1.0, 1: 2.0, 2: 3.0}
  records = [
    record(trial, losses[trial.seed])
    if trial.row == "Hope"
    else Record(trial, LEFT, None, {}, "", None)
    for trial in trials
  ]
  hope, off, *_ = ablations.lines(records)
  assert (hope["model"], hope["seeds"]) == ("Hope", "3")
  assert hope["test loss"] == "2.000 ± 1.000"
  assert hope["recall %"] == "50.0 ± 0.0"
  assert hope["paper: ppl"] == "12.24"
  assert off["model"] == "Hope, writes off: all"
  assert off["test loss"] == "3.000 ± 1.000"


def test_curves_are_means_over_seeds():
  trials = [t for t in context_usage.PLANS["cpu"]()({}) if t.row == "Hope"]
  found = context_usage.curves([record(t, float(t.seed)) for t in trials])
  assert found == {
    "Hope": {64: 1.0, 128: 0.0},
    "Hope, writes off": {64: 1.0, 128: 0.0},
  }


def test_reports_of_nothing_say_so(tmp_path):
  for module in (ablations, context_usage):
    records = [
      Record(t, LEFT, None, {}, "", tmp_path)
      for t in module.PLANS["smoke"]()({})
    ]
    module.report(records, tmp_path, "smoke")
    assert "nothing is done yet" in (tmp_path / "table.md").read_text()
