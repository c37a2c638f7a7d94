"""The reasoning tasks of Table 2: `hope_jax.harness` on every row's best model.

Scores are lm-eval's on local task files (`tasks/`), zero-shot.  Bounds are 95 %
for the drawing of documents, which all seeds share: their mean over seeds.
"""

import importlib.util
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments import tables
from experiments.runner import Record
from experiments.trials import ROOT, Evaluation
from hope_jax.config import ConfigError

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
  by_name = {(x["task"], x["metric"]): x for x in content["scores"]}
  found = {}
  for column, name in COLUMNS.items():
    score, error, chance = (
      100 * by_name[name][key] for key in ("score", "stderr", "chance")
    )
    found[column] = Score(score, 1.96 * error, chance)
  means = map(statistics.fmean, zip(*found.values(), strict=True))
  score, _, chance = means
  bound = math.hypot(*(x.bound for x in found.values())) / len(found)
  return {**found, MEAN: Score(score, bound, chance)}


def by_row(
  records: Sequence[Record],
) -> dict[str, list[dict[str, Score]]]:
  """Row -> scores of each of its finished seeds."""
  found: dict[str, list[dict[str, Score]]] = {}
  for record in tables.final(records):
    if LABEL in record.evaluations:
      measured = scores(record.evaluations[LABEL])
      found.setdefault(record.trial.row, []).append(measured)
  return found


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
