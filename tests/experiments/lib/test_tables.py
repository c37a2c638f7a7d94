"""Tables and plots of an experiment."""

import json
import math
import pathlib
from collections.abc import Mapping

import pytest

from experiments.language_modeling import run as language_modeling
from experiments.lib import plots, results, switch_off, tables
from experiments.lib.results import (
  DONE,
  FAILED,
  TRAIN,
  VALID,
  Curve,
  Origin,
  Record,
)
from experiments.lib.trials import Evaluation, Trial
from experiments.mqar import run as mqar
from hope_jax import config as config_lib


def _record(
  row: str,
  seed: int,
  loss: float,
  *,
  status: str = DONE,
  is_final: bool = True,
  group: str = "text",
  curves: Mapping[str, Curve] | None = None,
) -> Record:
  trial = Trial(
    group=group,
    row=row,
    name=f"{row}-{seed}-{loss}",
    config="configs/shakespeare.py",
    mode="hope",
    seed=seed,
    evaluations=(Evaluation("off_cms_0", ()),) if is_final else (),
    is_final=is_final,
  )
  result = {
    "parameters": 1_000_000,
    "tokens": 4096,
    "test_loss": loss,
    "accuracy": loss / 4,
    "tokens_per_second": 1000.0 + seed,
    "config": config_lib.to_dict(config_lib.Config()),
  }
  off = {"off_cms_0": {"loss": loss + 1, "accuracy": 0.1}}
  return Record(
    trial,
    status,
    result if status == DONE else None,
    off if is_final and status == DONE else {},
    "" if status == DONE else "exit code 1",
    pathlib.Path("none"),
    curves or {},
    Origin("2026-11-30", "a machine") if status == DONE else None,
  )


def test_mean_std_uses_the_sample_deviation():
  assert tables.mean_std([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
  assert tables.mean_std([1.5]) == "1.500"
  assert tables.mean_std([]) == "-"


def test_markdown_of_nothing_says_so():
  assert tables.markdown([]) == "(nothing is done yet)\n"


def test_markdown_aligns_and_fills_missing_cells():
  text = tables.markdown(
    [{"model": "a", "x": "1", "z": ""}, {"model": "bb", "y": "2"}]
  )
  assert text.splitlines() == [
    "| model |   x |   y |",
    "| ----- | --: | --: |",
    "| a     |   1 |     |",
    "| bb    |     |   2 |",
  ]


def test_table_is_over_final_finished_trials_only():
  records = [
    _record("hope", 0, 1.0),
    _record("hope", 1, 3.0),
    _record("hope", 2, 9.0, status=FAILED),
    _record("hope", 0, 7.0, is_final=False),
    _record("hope", 0, 7.0, group="other"),
  ]
  text = tables.table(records, "text", language_modeling.COLUMNS)
  header, _, live, off = (
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in text.splitlines()
  )
  live = dict(zip(header, live, strict=True))
  off = dict(zip(header, off, strict=True))
  assert live["test loss"] == "2.000 ± 1.414"
  assert (live["seeds"], live["trials"]) == ("2", "4")
  assert live["bits per byte"].startswith(f"{2 / math.log(2):.3f}")
  assert off["model"] == "hope, writes off: cms_0"
  assert off["test loss"] == "3.000 ± 1.414"


def test_table_of_an_unfinished_row_has_dashes():
  text = tables.table(
    [_record("hope", 0, 1.0, status=FAILED)], "text", mqar.COLUMNS
  )
  cells = [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]]
  assert cells == ["hope", *["-"] * 6, "0", "1"]


def test_description_has_the_median_speed():
  done = [_record("hope", seed, 1.0) for seed in (0, 1, 8)]
  assert tables.description(done) == {
    "parameters": "1,000,000",
    "tokens": "4,096",
    "tokens/s": "1,001",
    "peak lr": "0.001",
  }


def test_caption_has_all_seeds_and_what_failed():
  records = [_record("hope", 0, 1.0), _record("titans", 2, 2.0, status=FAILED)]
  first, failed = tables.caption(records).splitlines()
  assert first == "2026-11-30, a machine, seeds 0, 2; 1 of 2 trials done."
  assert failed == "Failed: titans-2-2.0: exit code 1"


def test_caption_has_the_days_and_machines_of_the_trials_not_of_the_report():
  first, other = _record("hope", 0, 1.0), _record("hope", 1, 1.0)
  other = other._replace(origin=Origin("2026-11-21", "another"))
  assert tables.caption([first, other]).startswith(
    "2026-11-21 to 2026-11-30, a machine; another, seeds 0, 1; 2 of 2"
  )


def test_accuracies_are_percent_of_rows_with_any():
  records = [
    _record("hope", 0, 1.0),
    _record("hope", 1, 2.0),
    _record("titans", 0, 1.0, status=FAILED),
  ]
  assert tables.accuracies(records, "text") == {"hope": [25.0, 50.0]}


def test_evaluations_stand_below_their_row_in_the_order_of_the_plan():
  record = _record("hope", 0, 1.0)
  off = {"loss": 2.0, "accuracy": 0.1}
  record = record._replace(evaluations={"off_memory": off, "off_cms_0": off})
  lines = tables.table([record], "text", mqar.COLUMNS).splitlines()
  assert ["memory" in lines[3], "cms_0" in lines[4]] == [True, True]


def test_publish_writes_and_prints_table_and_results(tmp_path, capsys):
  records = [_record("hope", 0, 1.0), _record("hope", 1, 2.0, status=FAILED)]
  folder = tmp_path / "new"
  tables.publish(folder, "x", records, "the text\n", samples={"Hope": "Ay"})
  assert (folder / "table.md").read_text() == "the text\n"
  assert json.loads((folder / "results.json").read_text())["samples"]
  (record,) = results.read(folder / "results.json").values()
  assert record.trial.name == "hope-0-1.0"
  shown = capsys.readouterr().out
  assert shown == f"\nthe text\n\nwritten to {folder}: results.json, table.md\n"


def test_smooth_is_a_trailing_mean():
  smooth = plots._smooth(plots.np.array([3.0, 5.0, 7.0, 9.0]), 3)
  assert smooth.tolist() == pytest.approx([3.0, 4.0, 5.0, 7.0])


def test_curve_is_the_mean_over_the_records_that_have_the_step():
  curves = Curve([1], [4.0]), Curve([1, 2], [2.0, 3.0])
  records = [_record("hope", 0, 1.0, curves={TRAIN: curve}) for curve in curves]
  tokens, loss = plots._curve(records, TRAIN)
  assert (tokens * 1e6).tolist() == [8 * 256, 2 * 8 * 256]
  assert loss.tolist() == [3.0, 3.0]


def test_bars_are_means_beside_each_other(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(plots, "_save", lambda figure, _: drawn.append(figure))
  rows = {"hope": {"8": [1.0, 2.0], "32": [5.0]}, "x": {"8": [4.0]}}
  plots.bars(tmp_path, rows, title="t", ylabel="y")
  (axes,) = drawn[0].axes
  bars = [p for p in axes.patches if p.get_height()]  # without the legend's
  found = [(p.get_x() + p.get_width() / 2, p.get_height()) for p in bars]
  assert sorted(found) == [
    (pytest.approx(-0.2), 1.5),
    (pytest.approx(0.2), 5.0),
    (pytest.approx(0.8), 4.0),
  ]


def test_plots_are_written(tmp_path):
  curves = {TRAIN: Curve([1, 2], [3.0, 2.0]), VALID: Curve([2], [2.5])}
  record = _record("hope", 0, 1.0, curves=curves)
  tokens, loss = plots._curve([record], VALID)
  assert (tokens * 1e6).tolist() == [2 * 8 * 256] and loss.tolist() == [2.5]
  path = tmp_path / "plots" / "loss.png"
  plots.loss_curves(path, {"hope": [record], "none": []}, "title")
  assert path.read_bytes().startswith(b"\x89PNG")
  path = tmp_path / "bars.png"
  plots.bars(
    path, {"hope": {"8": [1.0, 2.0]}, "x": {"8": []}}, title="t", ylabel="y"
  )
  assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_of_losses_that_were_not_kept_leaves_the_old_one(tmp_path):
  path = tmp_path / "loss.png"
  path.write_text("old")
  plots.loss_curves(path, {"hope": [_record("hope", 0, 1.0)]}, "title")
  assert path.read_text() == "old"
  plots.loss_curves(path, {"hope": []}, "title")
  assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("module", [language_modeling, mqar])
def test_report_of_a_partly_failed_experiment(tmp_path, module, capsys):
  group = next(iter(getattr(module, "GROUPS", {"text": ""})))
  rows = switch_off.CORE_ROWS
  records = [
    _record(rows[2], 0, 1.0, group=group, curves={TRAIN: Curve([1], [2.0])}),
    _record(rows[0], 0, 1.0, group=group, status=FAILED),
  ]
  module.report(records, tmp_path, "cpu")
  shown = capsys.readouterr().out
  assert "1 of 2 trials done" in shown
  assert len(results.read(tmp_path / "results.json")) == 1
  assert (tmp_path / "table.md").exists() and list(tmp_path.glob("*.png"))
