"""results.json: what is written is read, and the published ones are whole."""

import json
import math
import pathlib

import pytest

from experiments.ablations import run as ablations
from experiments.cms import run as cms
from experiments.context_usage import run as context_usage
from experiments.language_modeling import run as language_modeling
from experiments.language_modeling import table2
from experiments.lib import results, runner, tables
from experiments.lib.results import DONE, LEFT, TRAIN, VALID, Curve, Origin
from experiments.lib.trials import ROOT, Evaluation, Trial, resolve
from experiments.mqar import run as mqar
from experiments.texts.subwords import Size
from hope_jax import config as config_lib
from hope_jax.config import ConfigError

ORIGIN = Origin("2026-11-30", "a machine", {"content": "4a51"})


def finished(name: str, **overrides) -> results.Record:
  trial = Trial(
    group="text",
    row="hope",
    name=name,
    config="configs/shakespeare.py",
    mode="hope",
    overrides=overrides,
    seed=3,
    evaluations=(Evaluation("off", ()),),
    is_final=False,
  )
  config = json.loads(json.dumps(config_lib.to_dict(resolve(trial))))
  return results.Record(
    trial,
    DONE,
    {"valid_loss": 1.0, "test_loss": 0.1 + 0.2, "config": config},
    {"off": {"step": 8, "loss": 2.5}},
    "",
    pathlib.Path("none"),
    {TRAIN: Curve([1, 2], [3.0, 2.0]), VALID: Curve([2], [2.5])},
    ORIGIN,
  )


def read(path: pathlib.Path) -> dict[str, results.Record]:
  return {r.trial.name: r for r in results.read(path).values()}


def test_what_is_written_is_read(tmp_path):
  path = tmp_path / "results.json"
  records = [finished("b", **{"opt.peak_lr": 0.25}), finished("a")]
  results.write(path, "x", records)
  found = read(path)
  for record in records:
    name = record.trial.name
    assert found[name] == record._replace(workdir=tmp_path / name)
  text = path.read_text()
  results.write(path, "x", found.values())
  assert path.read_text() == text


def test_configs_stand_once_and_trials_are_sorted_lines(tmp_path):
  path = tmp_path / "results.json"
  records = [finished("b", **{"opt.peak_lr": 0.25}), finished("a")]
  old = records[0].result
  assert old is not None
  del old["config"]["data"]["seed"]  # of a version with fewer fields
  results.write(path, "x", [*records, finished("c", **{"opt.b1": 0.5})])
  content = json.loads(path.read_text())
  assert len(content["configs"]) == 2
  assert [(t["name"], t["recorded"]) for t in content["trials"]] == [
    ("a", [0, {}]),
    ("b", [1, {}]),
    ("c", [0, {"opt.b1": 0.5}]),
  ]
  assert sum('"name":' in line for line in path.open()) == 3


def test_only_finished_trials_are_written_beside_those_that_are_there(tmp_path):
  path = tmp_path / "results.json"
  results.write(path, "x", [finished("a"), finished("b")])
  again = finished("b")
  assert again.result is not None
  again.result["test_loss"] = 7.0
  left = finished("c")._replace(status=LEFT)
  results.write(path, "x", [again._replace(evaluations={}), left])
  found = read(path)
  assert list(found) == ["a", "b"]
  assert found["b"].result == again.result and not found["b"].evaluations


def test_evaluations_of_the_same_training_are_united(tmp_path):
  path = tmp_path / "results.json"
  results.write(path, "x", [finished("a")])
  more = {"context": {"step": 8, "loss": 2.0}}
  results.write(path, "y", [finished("a")._replace(evaluations=more)])
  assert set(read(path)["a"].evaluations) == {"off", "context"}


def test_numbers_that_json_does_not_have_are_null(tmp_path):
  path = tmp_path / "results.json"
  record = finished("a")
  scores = {"off": {"loss": math.inf, "workdir": "x", "dynamics": {"a": 1.0}}}
  results.write(path, "x", [record._replace(evaluations=scores)])
  assert read(path)["a"].evaluations == {"off": {"loss": None}}


@pytest.mark.parametrize("count", [0, 1, 2, 41, 42, 81, 161, 1000])
def test_curve_is_thinned_to_its_bound_with_both_ends(count):
  points = [(10 * (i + 1), 1 / (i + 1)) for i in range(count)]
  steps, losses = results.thinned(points)
  assert len(steps) == len(losses) <= results.INTERVALS + 1
  assert len(steps) >= min(count, results.INTERVALS / 2)
  if count:
    assert (steps[0], steps[-1]) == (10, 10 * count)
    assert losses[-1] == pytest.approx(1 / count, rel=1e-4)


def test_curves_are_the_finite_losses_of_training_and_validation(tmp_path):
  rows = [
    {"step": 1, "kind": "train", "loss": 3.000001},
    {"step": 2, "kind": "train", "loss": None},
    {"step": 2, "kind": "dynamics", "dynamics/x": 1.0},
    {"step": 2, "kind": "eval", "split": "valid", "loss": 2.5},
    {"step": 2, "kind": "eval", "split": "test", "loss": 2.6},
  ]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (tmp_path / "metrics.jsonl").write_text(text)
  assert results.curves(tmp_path) == {TRAIN: ([1], [3.0]), VALID: ([2], [2.5])}


@pytest.mark.parametrize(
  "text",
  [
    "{",
    "[]",
    '{"configs": [], "trials": [{}]}',
    '{"configs": [], "trials": [{"recorded": [0, {}]}]}',
  ],
)
def test_damaged_file_is_an_error(tmp_path, text):
  path = tmp_path / "results.json"
  path.write_text(text)
  with pytest.raises(ConfigError, match="results.json"):
    results.read(path)


def test_file_of_an_earlier_version_counts_as_none(tmp_path):
  path = tmp_path / "results.json"
  path.write_text('{"trials": [{"name": "a", "status": "done"}]}')
  assert results.read(path) == {}
  assert results.read(tmp_path / "missing.json") == {}


# Folder of published results -> its experiment's report, and its plan.
PUBLISHED = {
  "ablations/results": (ablations.report, ablations.PLANS["cpu"]()),
  "cms/results": (cms.report, cms.PLANS["cpu"]()),
  "mqar/results": (mqar.report, mqar.PLANS["cpu"]()),
  "context_usage/results": (
    context_usage.report,
    context_usage.PLANS["cpu"](),
  ),
  "language_modeling/results": (
    language_modeling.report,
    language_modeling.cpu_plan("data"),
  ),
  "language_modeling/results_t2": (
    language_modeling.report,
    table2.plan(table2.SCALES["t2"], "data"),
  ),
}


@pytest.mark.parametrize("folder", PUBLISHED)
def test_published_tables_follow_from_results_json_alone(
  folder, tmp_path, monkeypatch
):
  """Also where a default has changed since, which the runner refuses."""
  monkeypatch.setattr(runner, "is_same", lambda *_: True)
  report, plan = PUBLISHED[folder]
  path = ROOT / "experiments" / folder / results.NAME
  scale = folder.rpartition("_")[2] if "_t2" in folder else "cpu"
  sizes = json.loads(path.read_text()).get("test_splits", {})
  found = {name: Size(**size) for name, size in sizes.items()}
  monkeypatch.setattr(table2.subwords, "sizes", lambda _: found)
  records = runner.Runner(plan, tmp_path, published=path).records()
  done = [record for record in records if record.status == DONE]
  assert len(done) == len(results.read(path))
  report(records, tmp_path / "report", scale)
  for name in (tables.TABLE, results.NAME):
    written = (tmp_path / "report" / name).read_text()
    assert written == (path.parent / name).read_text()
