"""Table 2's harness, without training anything."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import pytest

from experiments.language_modeling import paper, reasoning, table2
from experiments.lib import switch_off, tables, trials
from experiments.lib.results import DONE, FAILED, LEFT, Record
from experiments.texts.subwords import Size
from hope_jax import config as config_lib
from hope_jax.config import Config, ConfigError

SIZES = {
  "wikitext2": Size(tokens=10, bytes=20, words=5),
  "novels": Size(tokens=10, bytes=40, words=5),
}


def _planned(scale: table2.Scale) -> Sequence[trials.Trial]:
  """All trials of a scale: of its grid, the first rate is the best."""
  plan = table2.plan(scale, "data")
  rates = (scale.rates[0], scale.recall_rates[0])
  results = {
    trial.name: {
      "valid_loss": float(trial.overrides["opt.peak_lr"] not in rates)
    }
    for trial in plan({})
  }
  return plan(results)


def _task_scores(seed: int) -> Mapping[str, object]:
  """The harness's JSON: half of all right, LAMBADA a tenth per seed."""
  scores = [
    {
      "task": task,
      "metric": metric,
      "score": 0.1 * seed if column == "LAMBADA" else 0.5,
      "stderr": 0.02,
      "chance": 0.0 if column == "LAMBADA" else 0.4,
      "documents": 200,
      "shots": 0,
    }
    for column, (task, metric) in reasoning.COLUMNS.items()
  ]
  other = {**scores[0], "task": "hellaswag", "metric": "acc", "score": 1.0}
  return {"step": 500, "scores": [*scores, other]}


def _records(
  scale: table2.Scale, losses: Mapping[str, float], missing: str = ""
) -> list[Record]:
  """Everything done, with a row's test loss; but the last seed of `missing`."""
  config = config_lib.to_dict(Config())
  found = []
  for trial in _planned(scale):
    is_left = trial.row == missing and trial.seed == scale.seeds[-1]
    result = {
      "parameters": 1_500_000,
      "tokens": 1_024_000,
      "test_loss": losses.get(trial.row, 9.0),
      "accuracy": 0.5,
      "tokens_per_second": 1000.0,
      "config": config,
    }
    off = {
      e.label: _task_scores(trial.seed)
      if e.command == "harness"
      else {"loss": 1.0, "accuracy": 0.25}
      for e in trial.evaluations
    }
    status, folder = LEFT if is_left else DONE, pathlib.Path("none")
    done = (None, {}) if is_left else (result, off)
    found.append(Record(trial, status, *done, "", folder))
  return found


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
  monkeypatch.setattr(table2.plots, "loss_curves", lambda *_: None)
  monkeypatch.setattr(table2.plots, "bars", lambda *_, **__: None)


def test_measures_of_a_hand_example():
  # Each of 10 targets costs one bit: 10 bits in 5 words and in 20 bytes.
  loss = math.log(2)
  assert table2.word_perplexity(loss, SIZES["wikitext2"]) == pytest.approx(4)
  assert table2.bits_per_byte(loss, SIZES["wikitext2"]) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["t2", "gpu"])
def test_rows_have_equal_tokens_and_one_grid(name):
  scale = table2.SCALES[name]
  settings: dict[str, dict[str, set]] = {}
  for trial in table2.plan(scale, "data")({}):
    config = trials.resolve(trial)
    tokens = config.train.steps * (
      config.data.batch_size * config.data.sequence_length
    )
    if trial.group == table2.TEXT:
      assert tokens >= {"t2": 1e6, "gpu": 1e8}[name]
      assert config.eval.batches == 0  # measures are of whole splits
      assert config.data.path.startswith(scale.data.folder)
    row = settings.setdefault(trial.group, {}).setdefault(trial.row, set())
    row.add((config.opt.peak_lr, tokens, config.opt.warmup_steps))
  for rows in settings.values():
    assert tuple(rows) == scale.rows
    assert len(set(map(frozenset, rows.values()))) == 1
    assert len(rows["Hope"]) == 3
  seeds = {trial.seed for trial in _planned(scale) if trial.is_final}
  assert seeds == {"t2": {0}, "gpu": {0, 1, 2}}[name]


def test_scales_have_the_promised_rows():
  models = [r for r in table2.SCALES["t2"].rows if r in switch_off.MODELS]
  assert len(models) == 8
  assert set(paper.ROWS) <= set(table2.SCALES["gpu"].rows)
  assert set(paper.ROWS) <= set(switch_off.MODELS)


def test_all_that_learns_in_the_sequence_has_a_twin_and_its_switch_offs():
  for row, mode in switch_off.MODELS.items():
    trial = trials.Trial("", row, row, "configs/shakespeare.py", mode)
    levels = trials.resolve(trial).model.fast_levels
    assert (f"{row} twin" in switch_off.ROWS) == bool(levels), row
    off = switch_off.switch_offs(row)
    named = [e.flags[-1].removeprefix("--level=") for e in off[1:]]
    assert bool(off) == bool(levels)
    assert {n for name in named for n in name.split(",")} in (set(), {*levels})
    assert not switch_off.switch_offs(f"{row} twin" if levels else row)


def test_ranks_share_places_and_follow_the_direction():
  assert paper.ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
  assert paper.ranks([math.nan, 1.0, 3.0, math.nan]) == [3.5, 1.0, 2.0, 3.5]
  # Hope has the lowest perplexity of three and the highest accuracy.
  ranked = paper.ranked("760M", ["Samba", "Mamba", "RetNet", "Hope"])
  assert ranked == {"Samba": (2, 2), "RetNet": (3, 3), "Hope": (1, 1)}


def test_spearman_of_the_papers_own_and_the_reversed_order():
  theirs = {row: n.perplexity for row, n in paper.TABLE["760M"].items()}
  assert paper.spearman(theirs, "760M") == pytest.approx(1)
  theirs = {row: -value for row, value in theirs.items()}
  assert paper.spearman(theirs, "760M") == pytest.approx(-1)


@pytest.mark.parametrize(
  ("name", "missing"), [("t2", ""), ("gpu", "Hope"), ("gpu", "Titans twin")]
)
def test_no_correlation_from_a_cpu_or_an_unfinished_run(
  tmp_path, name, missing
):
  scale = table2.SCALES[name]
  table2.report(_records(scale, {}, missing), tmp_path, name, SIZES)
  text = (tmp_path / "table.md").read_text()
  assert "Spearman" not in text and "our rank" not in text
  assert ("check of the pipeline only" in text) == (name == "t2")
  assert "18.68 / 52.28 (1, 1)" in text  # the paper's rank is always there
  assert not json.loads((tmp_path / "results.json").read_text())["correlations"]


def test_caption_names_what_failed():
  first, *others = _records(table2.SCALES["t2"], {})
  assert "Failed" not in tables.caption([first])
  failed = first._replace(status=FAILED, message="disk full")
  assert f"Failed: {first.trial.name}: disk full" in tables.caption(
    [failed, *others]
  )


def test_no_ranks_while_a_rate_is_left():
  scale = table2.SCALES["gpu"]
  found = _records(scale, {})
  assert table2.is_complete(found, scale)
  at = next(i for i, r in enumerate(found) if not r.trial.is_final)
  for status, is_complete in ((LEFT, False), (FAILED, True)):
    found[at] = found[at]._replace(status=status)
    assert table2.is_complete(found, scale) == is_complete


def test_finished_gpu_run_has_ranks_and_correlations(tmp_path):
  losses = {r: math.log(n.perplexity) for r, n in paper.TABLE["340M"].items()}
  losses |= {r: math.log(n.perplexity) for r, n in paper.TABLE["760M"].items()}
  found = _records(table2.SCALES["gpu"], losses)
  table2.report(found, tmp_path, "gpu", SIZES)
  text = (tmp_path / "table.md").read_text()
  assert "* 760M, 11 rows: 1.00 (1.00 to 1.00)" in text
  (line,) = (x for x in text.splitlines() if "(1, 1)" in x and "18.68" in x)
  assert "1 (1 to 1)" in line


def test_table_has_every_measure_of_a_row(tmp_path):
  found = _records(table2.SCALES["t2"], {"Titans": math.log(2)})
  line, off = (
    x
    for x in table2.lines(found, SIZES)
    if x["model"].startswith("Titans") and "twin" not in x["model"]
  )
  assert line == {
    "model": "Titans",
    "WikiText ppl": "2.00",
    "WikiText word ppl": "4.0",
    "WikiText bits/byte": "0.500",
    "novels ppl": "2.72",
    "novels bits/byte": f"{10 / math.log(2) / 40:.3f}",
    "MQAR %": "50.0",
    "parameters": "1,500,000",
    "tokens": "1,024,000",
    "tokens/s": "1,000",
    "peak lr": "0.001",
    "seeds": "1",
    "trials": "3 + 3",
  }
  assert off["model"] == "Titans, writes off: all"
  assert (off["WikiText ppl"], off["MQAR %"]) == ("2.72", "25.0")


def test_reasoning_scores_have_bounds_and_chance(tmp_path):
  # Three seeds: 0, 10 and 20 % of LAMBADA, half of the other seven.
  losses = {row: 1.0 + i for i, row in enumerate(paper.ROWS)}
  found = _records(table2.SCALES["gpu"], losses)
  *rows, chance = reasoning.lines(reasoning.by_row(found, table2.TEXT))
  assert [line["model"] for line in rows] == [*table2.SCALES["gpu"].rows]
  assert rows[0]["LAMBADA"] == "10.0 ± 3.9"  # 1.96 x 2 %, not less by 3 seeds
  assert rows[0]["PIQA"] == rows[0]["HellaSwag (n)"] == "50.0 ± 3.9"
  assert rows[0][reasoning.MEAN] == "45.0 ± 1.4"  # less by sqrt(8)
  assert (chance["LAMBADA"], chance["PIQA"]) == ("0.0", "40.0")
  assert chance[reasoning.MEAN] == "35.0"
  table2.report(found, tmp_path, "gpu", SIZES)
  text = (tmp_path / "table.md").read_text()
  assert "45.0 ± 1.4" in text and "writes off: tasks" not in text
  (hope,) = (line for line in text.splitlines() if "14.39 / 58.04" in line)
  assert "45.0 ± 1.2 " in hope  # sample deviation of 43.75, 45 and 46.25


def test_every_text_row_is_scored_by_the_harness_on_the_same_documents():
  for name, limit in (("t2", ("--limit=200",)), ("gpu", ())):
    scale = table2.SCALES[name]
    scored = {
      trial.row: [e for e in trial.evaluations if e.command == "harness"]
      for trial in _planned(scale)
      if trial.is_final and trial.group == table2.TEXT
    }
    assert tuple(scored) == scale.rows
    for (evaluation,) in scored.values():
      assert evaluation.flags[2:] == ("--data=data", *limit)


def test_missing_tasks_are_said_before_anything_runs(tmp_path):
  with pytest.raises(ConfigError, match="has no folder qa"):
    table2.prepare(str(tmp_path), table2.SCALES["t2_smoke"])
