"""Multi-query associative recall, live memories against their twins.

python -m experiments.mqar.run --scale=cpu

Writes results.json, table.md and accuracy.png; see README.md for the
protocol.
"""

import functools
import pathlib
import sys
from collections.abc import Sequence

from experiments.lib import plots, runner, switch_off, tables
from experiments.lib.results import Record
from experiments.lib.trials import Plan, Trial, slug, variant

# Group -> suffix of the mode.  The smallest group has every switch-off, the
# others only that of all writes.
GROUPS = {
  "32 pairs, T 256": "_32",
  "64 pairs, T 512": "_64",
  "8 pairs, T 64": "",
}
CHANCE = 1 / 64
# Best of the same three rates for every row at 8 pairs (results_2026-11-21.md).
ATTENTION_RATE, MEMORY_RATE = 2e-3, 4e-3


def _rows(group: str, switch: str) -> list[Trial]:
  end = GROUPS[group]
  return [
    switch_off.trial(
      row,
      group=group,
      name=f"pairs{end or '_8'}/{slug(row)}",
      config="configs/mqar.py",
      suffix=end + switch,
      overrides={"train.keep_checkpoints": 1, "train.eval_every": 0},
      evaluations=switch_off.switch_offs(row)[: 1 if end else None],
    )
    for row in switch_off.CORE_ROWS
  ]


def _rate(row: str) -> float:
  return ATTENTION_RATE if row.startswith("Transformer") else MEMORY_RATE


def plan(switch: str = "", seeds: Sequence[int] = (0, 1, 2)) -> Plan:
  """All sizes seed by seed, memories first."""
  trials = [
    variant(trial, _rate(trial.row), seed)
    for seed in seeds
    for group in GROUPS
    for trial in reversed(_rows(group, switch))
  ]
  return lambda _: trials


PLANS = {
  "cpu": plan,
  "smoke": functools.partial(plan, switch=",smoke", seeds=(0, 1)),
}

COLUMNS = {
  "accuracy %": tables.accuracy,
  "test loss": lambda scores: tables.mean_std(s["loss"] for s in scores),
}


def report(records: Sequence[Record], folder: pathlib.Path, scale: str) -> None:
  """Writes and prints the accuracy tables and the bar chart."""
  text, points = "", {row: {} for row in switch_off.CORE_ROWS}
  for group in GROUPS:
    text += f"{group}\n\n{tables.table(records, group, COLUMNS)}\n"
    for row, trials in tables.by_row(records, group).items():
      points[row][group] = [
        100 * tables.scores(record)["accuracy"]
        for record in tables.final(trials)
      ]
  text += f"Chance is {100 * CHANCE:.1f} %.  {tables.caption(records)}"
  plots.bars(
    folder / "accuracy.png",
    points,
    title="Multi-query associative recall",
    ylabel="test accuracy (%)",
  )
  tables.publish(folder, "mqar", records, text)


def main(argv: Sequence[str] | None = None) -> int:
  return runner.main("mqar", PLANS, report, argv)


if __name__ == "__main__":
  sys.exit(main())
