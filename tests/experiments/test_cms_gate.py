"""The twin gate of the CMS."""

from experiments.cms import run
from experiments.lib.results import DONE, Record
from experiments.lib.trials import resolve


def test_only_the_cms_writes_and_the_twin_nothing():
  for plan in run.PLANS.values():
    for trial in plan()({}):
      model = resolve(trial).model
      live = [level for level in model.fast_levels if model.is_live(level)]
      assert live == ([] if trial.row == "twin" else list(run.LEVELS))


def test_table_has_the_switch_offs_of_every_row(tmp_path):
  records = []
  for trial in run.PLANS["cpu"]()({}):
    config = {"opt": {"peak_lr": 4e-3}}
    result = {"test_loss": 1.0, "accuracy": 0.5, "parameters": 7, "tokens": 9}
    result |= {"tokens_per_second": 3.0, "config": config}
    off = {e.label: {"loss": 2.0, "accuracy": 0.1} for e in trial.evaluations}
    records.append(Record(trial, DONE, result, off, "", tmp_path))
  run.report(records, tmp_path, "cpu")
  lines = (tmp_path / "table.md").read_text().splitlines()
  assert sum("writes off: all" in line for line in lines) == 2 * len(run.ROWS)
  assert sum("twin" in line for line in lines) == 2
