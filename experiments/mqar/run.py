"""Multi-query associative recall, live memories against their twins.

python -m experiments.mqar.run --scale=cpu

Writes results.json, table.md and accuracy.png; see README.md for the
protocol.
"""

import pathlib
import sys
from collections.abc import Sequence

from experiments import plots, runner, switch_off, tables
from experiments.trials import (
  Plan,
  Results,
  Trial,
  slug,
  staged,
  variant,
)

# Group -> suffix of the mode.
GROUPS = {"8 pairs, T 64": "", "32 pairs, T 256": "_32"}
CHANCE = 1 / 64


def _rows(group: str, switch: str) -> list[Trial]:
  end = GROUPS[group]
  return [
    switch_off.trial(
      row,
      group=group,
      name=f"pairs{end or '_8'}/{slug(row)}",
      config="configs/mqar.py",
      suffix=end + switch,
      overrides={"train.keep_checkpoints": 1},
    )
    for row in switch_off.ROWS
  ]


def plan(switch: str, rates: Sequence[float], seeds: Sequence[int]) -> Plan:
  """Every row at 8 pairs: all `rates` on a seed, then the other seeds; then
  at 32 pairs at the rate so chosen, on the first seed."""
  small, large = (_rows(group, switch) for group in GROUPS)
  swept = staged(small, rates=rates, seeds=seeds)
  at_32_pairs = {trial.row: trial for trial in large}

  def both(results: Results) -> list[Trial]:
    trials = swept(results)
    winners = [t for t in trials if t.is_final and t.seed == seeds[0]]
    return [
      *trials,
      *(
        variant(at_32_pairs[t.row], t.overrides["opt.peak_lr"], t.seed)
        for t in winners
      ),
    ]

  return both


PLANS = {
  "cpu": lambda: plan("", rates=(2e-3, 4e-3, 8e-3), seeds=(0, 1, 2)),
  "smoke": lambda: plan(",smoke", rates=(1e-3, 2e-3), seeds=(0, 1)),
}

COLUMNS = {
  "accuracy %": lambda scores: tables.mean_std(
    (100 * s["accuracy"] for s in scores), digits=1
  ),
  "test loss": lambda scores: tables.mean_std(s["loss"] for s in scores),
}


def report(
  records: Sequence[runner.Record], folder: pathlib.Path, scale: str
) -> None:
  """Writes and prints the accuracy tables and the bar chart."""
  folder.mkdir(parents=True, exist_ok=True)
  text, points = "", {row: {} for row in switch_off.ROWS}
  for group in dict.fromkeys(record.trial.group for record in records):
    text += f"{group}\n\n{tables.table(records, group, COLUMNS)}\n"
    for row, trials in tables.by_row(records, group).items():
      points[row][group] = [
        100 * tables.scores(record)["accuracy"]
        for record in tables.final(trials)
      ]
  text += f"Chance is {100 * CHANCE:.1f} %.  {tables.caption(records)}"
  (folder / "table.md").write_text(text)
  plots.bars(
    folder / "accuracy.png",
    points,
    title="Multi-query associative recall",
    ylabel="test accuracy (%)",
  )
  tables.write_results(
    folder / "results.json", "mqar", records, scale=scale, table=text
  )
  print(f"\n{text}\nwritten to {folder}: results.json, table.md, accuracy.png")


def main(argv: Sequence[str] | None = None) -> int:
  flags = runner.arguments("mqar", tuple(PLANS), argv)
  experiment = runner.Runner(
    PLANS[flags.scale](), flags.out, jobs=flags.jobs, budget=flags.budget
  )
  code = experiment.run()
  report(experiment.records(), flags.report, flags.scale)
  return code


if __name__ == "__main__":
  sys.exit(main())
