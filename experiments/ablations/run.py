"""Hope without its parts (Table 6): held-out books and recall.

python -m experiments.ablations.run --scale=cpu --data=FOLDER --jobs=2

Writes results.json, table.md and PNG plots; see README.md for the protocol.
"""

import functools
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.lib import plots, runner, switch_off, tables
from experiments.lib.results import Record
from experiments.lib.trials import Evaluation, Plan, Trial, slug
from experiments.texts import books

BOOKS, RECALL = "books, T 4096", "recall, 8 pairs"
SEEDS = (0, 1, 2)
# Both together take at most two hours on two cores for ROWS and SEEDS.
BOOKS_BUDGET = {"train.steps": 120, "eval.batches": 9}  # of 4096 tokens
RECALL_BUDGET = {"train.steps": 800}  # of 1024 tokens
NOTE = """\
Recall is multi-query associative recall (configs/mqar.py), accuracy; chance is
1.6 %.  "paper" is Table 6: perplexity per subword and reasoning accuracy of a
much larger Hope, for reference; it does not compare with ours per byte.
"""


class Ablation(NamedTuple):
  """A row: its changes to Hope, Table 6's perplexity and accuracy, and the
  groups in which these changes have an effect."""

  overrides: Mapping[str, Any]
  paper: tuple[float, float] | None = None
  groups: Sequence[str] = (BOOKS, RECALL)


def _adaptive(*boxes: str) -> dict[str, Any]:
  return {"model.memory.adaptive": boxes}


# The rows with three seeds, then the others of Table 6.  Our Hope has no
# adaptive q: where Table 6 removes it ("w/o q"), our row adds it.
ROWS = {
  "Hope": Ablation({}, (12.24, 58.1)),
  "Hope twin": Ablation(switch_off.TWIN),
  # Recall uses the associative signal, whose gradient has no second order.
  "Hope first order": Ablation({"model.cms.outer_order": 1}, groups=(BOOKS,)),
  "w/o CMS": Ablation({"model.cms.connection": "none"}, (13.04, 57.3)),
  "w/o DGD": Ablation({"model.memory.delta_rule": "none"}, (13.41, 56.5)),
}
OTHER_ROWS = {
  "w/o momentum": Ablation({"model.memory.momentum": "none"}, (13.58, 56.9)),
  "w/o weight decay": Ablation(
    {"model.memory.retention": "none"}, (13.71, 57.2)
  ),
  "w/o inner projection k": Ablation(
    _adaptive("v", "eta", "alpha"), (13.77, 56.9)
  ),
  "w/o inner projection v": Ablation(
    _adaptive("k", "eta", "alpha"), (13.90, 55.1)
  ),
  "with inner projection q": Ablation(
    _adaptive("k", "v", "q", "eta", "alpha"), (12.19, 57.4)
  ),
}
ALL_ROWS = {**ROWS, **OTHER_ROWS}


def evaluations(row: str) -> tuple[Evaluation, ...]:
  """Each level's writes off for Hope; only all of them for its ablations."""
  found = switch_off.switch_offs("Hope")
  if row == "Hope twin":
    return ()
  return found if row in ("Hope", "Hope first order") else found[:1]


def trial(
  row: str, group: str, seed: int, mode: str, overrides: Mapping[str, Any]
) -> Trial:
  """One row of a group at one seed."""
  config = "configs/books.py" if group == BOOKS else "configs/mqar.py"
  return Trial(
    group=group,
    row=row,
    name=f"{slug(group.split(',')[0])}/{slug(row).replace('/', '')}-{seed}",
    config=config,
    mode=mode,
    overrides={
      "train.keep_checkpoints": 1,
      **overrides,
      **ALL_ROWS[row].overrides,
    },
    seed=seed,
    evaluations=evaluations(row),
  )


def plan(
  switch: str = "", seeds: Sequence[int] = SEEDS, others: bool = False
) -> Plan:
  """Every row at the config's learning rate, seed by seed, so that rows can be
  compared at any time; `others` adds the rest of Table 6 on the first seed."""
  budgets = {BOOKS: BOOKS_BUDGET, RECALL: RECALL_BUDGET}
  rows = {seed: list(ROWS) for seed in seeds}
  if others:
    rows[seeds[0]] += OTHER_ROWS
  trials = [
    trial(row, group, seed, "hope" + switch, {} if switch else budgets[group])
    for seed in seeds
    for group in (BOOKS, RECALL)
    for row in rows[seed]
    if group in ALL_ROWS[row].groups
  ]
  return lambda _: trials


PLANS = {
  "cpu": plan,
  "all": functools.partial(plan, others=True),
  "smoke": functools.partial(plan, switch=",smoke", seeds=(0, 1)),
}


def lines(records: Sequence[Record]) -> list[tables.Line]:
  """A line per row and switch-off: perplexity and recall side by side."""
  found: list[tables.Line] = []
  groups = {group: tables.by_row(records, group) for group in (BOOKS, RECALL)}
  for row, ablation in ALL_ROWS.items():
    done = {g: tables.final(rows.get(row, [])) for g, rows in groups.items()}
    if not any(done.values()):
      continue
    for label in (None, *(e.label for e in evaluations(row))):
      scores = {
        group: [tables.scores(record, label) for record in trials]
        for group, trials in done.items()
      }
      name = row if label is None else f"{row}, {switch_off.describe(label)}"
      line = {"model": name, **_cells(scores)}
      if label is None:
        first = next(iter(done[BOOKS] or done[RECALL])).result or {}
        line["parameters"] = f"{first['parameters']:,}"
        line["seeds"] = str(max(map(len, done.values())))
        if ablation.paper:
          line["paper: ppl"], line["acc"] = map(str, ablation.paper)
      found.append(line)
  return found


def _cells(scores: Mapping[str, Sequence[tables.Scores]]) -> dict[str, str]:
  """The measured columns of a line."""
  text, recall = scores[BOOKS], scores[RECALL]
  return {
    "test loss": tables.mean_std(s["loss"] for s in text),
    "perplexity": tables.mean_std(math.exp(s["loss"]) for s in text),
    "recall %": tables.mean_std((100 * s["accuracy"] for s in recall), 1),
  }


def report(records: Sequence[Record], folder: pathlib.Path, scale: str) -> None:
  """Writes and prints the table; plots recall (bars) and losses (curves)."""
  text = f"{tables.markdown(lines(records))}\n{NOTE}{tables.caption(records)}"
  recall = {
    row: {RECALL: values}
    for row, values in tables.accuracies(records, RECALL).items()
  }
  plots.bars(
    folder / "recall.png", recall, title="Recall", ylabel="test accuracy (%)"
  )
  curves = tables.final_by_row(records, BOOKS)
  plots.loss_curves(folder / "loss.png", curves, BOOKS)
  tables.publish(folder, "ablations", records, text)


def main(argv: Sequence[str] | None = None) -> int:
  return runner.main("ablations", PLANS, report, argv, books.prepare_for)


if __name__ == "__main__":
  sys.exit(main())
