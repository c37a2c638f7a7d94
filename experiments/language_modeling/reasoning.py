"""The reasoning tasks of Table 2: `hope_jax.harness` on every row's best model.

Scores are lm-eval's on local task files (`tasks/`), zero-shot.  Bounds are 95 %
for the drawing of documents, which all seeds share: their mean over seeds.
"""

import importlib.util
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.lib import tables
from experiments.lib.results import Record
from experiments.lib.trials import ROOT, Evaluation
from hope_jax.config import ConfigError
from hope_jax.inference.lm_eval_tasks import Line

LABEL = "tasks"
FILES = "experiments/language_modeling/tasks"
MEAN = "mean %"


class Score(NamedTuple):
  """In percent; `bound` is half the width of the 95 % interval."""

  score: float
  bound: float
  chance: float


# Column of Table 2 -> lm-eval's task and its measure; `acc_norm` divides a
# choice's log-probability by its length, Table 2's "acc_n".
COLUMNS = {
  "LAMBADA": ("lambada_openai", "acc"),
  "PIQA": ("piqa", "acc"),
  "HellaSwag (n)": ("hellaswag", "acc_norm"),
  "WinoGrande": ("winogrande", "acc"),
  "ARC-e": ("arc_easy", "acc"),
  "ARC-c (n)": ("arc_challenge", "acc_norm"),
  "SIQA": ("social_iqa", "acc"),
  "BoolQ": ("boolq", "acc"),
}


def evaluation(data: str, limit: int | None) -> Evaluation:
  """The tasks in `data`, of each the first `limit` documents (None: all)."""
  tasks = ",".join(task for task, _ in COLUMNS.values())
  flags = [f"--tasks={tasks}", f"--include_path={FILES}", f"--data={data}"]
  if limit is not None:
    flags.append(f"--limit={limit}")
  return Evaluation(LABEL, tuple(flags), command="harness")


def check(data: str) -> None:
  """ConfigError before anything runs, if the harness could not."""
  if importlib.util.find_spec("lm_eval") is None:
    raise ConfigError(
      "the reasoning tasks need lm-eval: install hope-jax[eval]"
    )
  if not (ROOT / data / "qa").is_dir():
    raise ConfigError(f"--data={data} has no folder qa: see {FILES}/utils.py")


def scores(content: Mapping[str, Any]) -> dict[str, Score]:
  """Column -> score, from the harness's JSON; MEAN is their plain mean."""
  measured = [Line(**fields) for fields in content["scores"]]
  by_name = {(line.task, line.metric): line for line in measured}
  found = {}
  for column, name in COLUMNS.items():
    line = by_name[name]
    assert line.bound is not None and line.chance is not None
    numbers = (line.score, line.bound, line.chance)
    found[column] = Score(*(100 * number for number in numbers))
  score, _, chance = map(statistics.fmean, zip(*found.values(), strict=True))
  bound = math.hypot(*(x.bound for x in found.values())) / len(found)
  return {**found, MEAN: Score(score, bound, chance)}


def by_row(
  records: Sequence[Record], group: str
) -> dict[str, list[dict[str, Score]]]:
  """Row -> scores of each of its finished seeds, of those that have any."""
  return {
    row: [scores(record.evaluations[LABEL]) for record in done]
    for row, done in tables.final_by_row(records, group).items()
    if done
  }


def lines(
  rows: Mapping[str, Sequence[Mapping[str, Score]]],
) -> list[tables.Line]:
  """`31.5 ± 6.4` for each row, mean over seeds; last what guessing scores."""
  found: list[tables.Line] = []
  for row, seeds in rows.items():
    line = {"model": row}
    for column in seeds[0]:
      score, bound, _ = (
        statistics.fmean(x)
        for x in zip(*(seed[column] for seed in seeds), strict=True)
      )
      line[column] = f"{score:.1f} ± {bound:.1f}"
    found.append(line)
  if not found:
    return []
  some = next(iter(rows.values()))[0]
  chance = {column: f"{score.chance:.1f}" for column, score in some.items()}
  return [*found, {"model": "chance", **chance}]
