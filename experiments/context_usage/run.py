"""Perplexity by position in held-out books, to 32K tokens (Figure 10).

python -m experiments.context_usage.run --data=FOLDER --jobs=2 \
  --out=runs/ablations-cpu --report=runs/context_usage-cpu

Evaluates the models of experiments/ablations (trained there or, if missing,
here: both continue the same --out) and Titans on passages of 32,768 tokens, one
of every test book, with writes on and off.  Writes results.json, table.md and
context.png.
"""

import dataclasses
import functools
import math
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence

from experiments.ablations import run as ablations
from experiments.lib import plots, runner, switch_off, tables
from experiments.lib.results import Record
from experiments.lib.trials import Evaluation, Plan, Trial
from experiments.texts import books

LENGTH = books.PASSAGE
CONTEXT = ("--split=test", f"--length={LENGTH}", "--positions")
ON = Evaluation("context", CONTEXT)
OFF = Evaluation("context_off", (*CONTEXT, "--writes=off"))
TITANS = {"Titans": {}, "Titans twin": switch_off.TWIN}

# Position -> loss, nats.
Curve = Mapping[int, float]


def _titans(trial: Trial, row: str) -> Trial:
  """`trial`, which is Hope's, with Titans instead."""
  return dataclasses.replace(
    trial,
    row=row,
    name=trial.name.replace("/hope-", f"/{row.lower().replace(' ', '_')}-"),
    mode=trial.mode.replace("hope", "titans"),
    overrides={**trial.overrides, **TITANS[row]},
  )


def plan(**options) -> Plan:
  """The ablations' trials on books, and Titans, evaluated on long passages."""
  trials = [
    trial
    for trial in ablations.plan(**options)({})
    if trial.group == ablations.BOOKS and trial.row in ablations.ROWS
  ]
  hopes = [trial for trial in trials if trial.row == "Hope"]
  trials += [_titans(trial, row) for row in TITANS for trial in hopes]
  read = [
    dataclasses.replace(
      trial,
      evaluations=(ON,) if trial.row.endswith("twin") else (ON, OFF),
    )
    for trial in trials
  ]
  return lambda _: read


PLANS = {
  "cpu": plan,
  "smoke": functools.partial(plan, switch=",smoke", seeds=(0, 1)),
}


def curves(records: Sequence[Record]) -> dict[str, Curve]:
  """Row -> {end of a bin of positions: mean loss over seeds}."""
  found = {}
  for row, trials in tables.by_row(records, ablations.BOOKS).items():
    done = tables.final(trials)
    for evaluation in done[0].trial.evaluations if done else ():
      name = row + (", writes off" if evaluation == OFF else "")
      seeds = [
        {bin["end"]: bin["loss"] for bin in scores["by_position"]}
        for scores in (r.evaluations[evaluation.label] for r in done)
      ]
      found[name] = {
        end: statistics.fmean(seed[end] for seed in seeds) for end in seeds[0]
      }
  return found


def report(records: Sequence[Record], folder: pathlib.Path, scale: str) -> None:
  """Writes and prints the table, and the figure."""
  found = curves(records)
  lines = [
    {
      "model": name,
      **{f"to {end:,}": f"{math.exp(loss):.3f}" for end, loss in curve.items()},
    }
    for name, curve in found.items()
  ]
  text = f"Perplexity by position\n\n{tables.markdown(lines)}\n"
  text += tables.caption(records)
  plots.lines(
    folder / "context.png",
    {
      name: (list(curve), [math.exp(loss) for loss in curve.values()])
      for name, curve in found.items()
    },
    title="Held-out books",
    xlabel="position (end of bin)",
    ylabel="perplexity per byte",
  )
  tables.publish(folder, "context_usage", records, text)


def main(argv: Sequence[str] | None = None) -> int:
  return runner.main("context_usage", PLANS, report, argv, books.prepare_for)


if __name__ == "__main__":
  sys.exit(main())
