"""Trains the models of Table 2 on small text, with twins and switch-offs.

python -m experiments.language_modeling.run --scale=demo
python -m experiments.language_modeling.run --scale=cpu --data=FOLDER
python -m experiments.language_modeling.run --scale=t2 --data=FOLDER

Writes results.json, table.md and PNG plots; see README.md for the protocol.
"""

import argparse
import math
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Sequence

from experiments.language_modeling import paper, table2
from experiments.lib import plots, runner, switch_off, tables
from experiments.lib.results import Record
from experiments.lib.trials import ROOT, Plan, Trial, slug, staged
from hope_jax.training.evaluation import perplexity

SCALES = ("demo", "cpu", "smoke", *table2.SCALES)
# The longest first, so that shorter ones fill the other cores.
DEMO_ROWS = ("Hope", "Titans", "Transformer++", "Transformer++ conv")
DEMO_STEPS = 120  # so that scripts/run.sh takes minutes
RECALL, RECALL_ROWS = "Recall of 4 pairs, chance 12.5 %", ("Hope", "Hope twin")
RATES = (2e-3, 4e-3, 8e-3)
SEEDS = (0, 1, 2)
# Of 2 x 1024 tokens: 0.37M, a third of an epoch of tiny Shakespeare.
STEPS = 180
PROMPT, SAMPLE_TOKENS = "ROMEO:", 400

PAPER_NOTE = """\
Rows "paper" are Table 2's, for reference: WikiText perplexity per subword
(and mean accuracy on the reasoning tasks) after training on web text.  They
do not compare with perplexities per byte.
"""


def demo_plan(switch: str = "") -> Plan:
  """Four models at equal tokens, one seed, the config's learning rates; and a
  recall that only a memory can do, by a small Hope and its twin."""

  def trial(
    row: str, group: str, config: str, suffix: str, overrides: dict[str, int]
  ) -> Trial:
    return switch_off.trial(
      row,
      group=group,
      name=f"{slug(group.partition(',')[0])}/{slug(row)}",
      config=f"configs/{config}.py",
      suffix=suffix + switch,
      overrides={} if switch else overrides,
      evaluations=(),
    )

  quiet = {"train.eval_every": 0, "train.dynamics_every": 0}
  short = {"train.steps": DEMO_STEPS, **quiet}
  trials = [
    trial(row, "tiny Shakespeare", "shakespeare", "", short)
    for row in DEMO_ROWS
  ]
  trials[2:2] = [trial(row, RECALL, "mqar", "_4", quiet) for row in RECALL_ROWS]
  return lambda _: trials


def cpu_plan(data: str) -> Plan:
  """Two texts at T 1024: the same rates for every row, then three seeds."""
  common = {"train.steps": STEPS, "train.keep_checkpoints": 1}
  folder = {"data.path": str(pathlib.Path(data) / "wikitext2")}
  texts = {
    "tiny Shakespeare": ("configs/shakespeare.py", ",long", common),
    "WikiText-2": ("configs/wikitext2.py", "", {**common, **folder}),
  }
  rows = [
    switch_off.trial(
      row,
      group=group,
      name=slug(f"{group}/{row}"),
      config=config,
      suffix=switch,
      overrides=fields,
      evaluations=(
        *switch_off.switch_offs(row),
        switch_off.long_evaluation(row),
      ),
    )
    for group, (config, switch, fields) in texts.items()
    for row in switch_off.CORE_ROWS
  ]
  return staged(rows, rates=RATES, seeds=SEEDS)


def make_plan(flags: argparse.Namespace) -> Plan:
  """The plan of the flags' scale."""
  if flags.scale in table2.SCALES:
    return table2.plan(table2.SCALES[flags.scale], flags.data)
  if flags.scale == "cpu":
    return cpu_plan(flags.data)
  return demo_plan(",smoke" if flags.scale == "smoke" else "")


def prepare(flags: argparse.Namespace) -> None:
  """Makes the data of the flags' scale."""
  if flags.scale in table2.SCALES:
    table2.prepare(flags.data, table2.SCALES[flags.scale])


def relative_change(scores: Sequence[tables.Scores]) -> str:
  """|D| / |M_0| of every level, in percent, mean over seeds."""
  levels = [s["relative_change"] for s in scores if "relative_change" in s]
  if not levels:
    return ""
  means = {
    name: statistics.fmean(level[name] for level in levels)
    for name in levels[0]
  }
  return ", ".join(f"{name} {100 * x:.1f}" for name, x in means.items())


COLUMNS = {
  "test loss": lambda scores: tables.mean_std(s["loss"] for s in scores),
  "perplexity": lambda scores: tables.mean_std(
    perplexity(s["loss"]) for s in scores
  ),
  "bits per byte": lambda scores: tables.mean_std(
    s["loss"] / math.log(2) for s in scores
  ),
  "moved %": relative_change,
}
RECALL_COLUMNS = {"accuracy %": tables.accuracy}


def paper_lines() -> list[tables.Line]:
  """Rows of the paper's Table 2 as lines of our table."""
  return [
    {
      "model": f"paper: {row}",
      "perplexity": f"{numbers.perplexity:.2f} ({numbers.accuracy:.2f})",
      "parameters": size,
      "tokens": paper.TOKENS[size],
    }
    for size in ("340M", "1.3B")
    for row in ("Transformer++", "Titans", "Hope")
    for numbers in (paper.TABLE[size][row],)
  ]


def sample(record: Record) -> str:
  """Text that a trained model writes after PROMPT."""
  command = [
    sys.executable,
    "-m",
    "hope_jax.generate",
    f"--workdir={record.workdir}",
    f"--prompt={PROMPT}",
    f"--tokens={SAMPLE_TOKENS}",
    "--temperature=0.8",
    "--seed=0",
  ]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, errors="replace"
  )
  if done.returncode:
    return f"(no sample: {done.stderr.strip()[-300:]})"
  return done.stdout.rstrip("\n")


def report(records: Sequence[Record], folder: pathlib.Path, scale: str) -> None:
  """Writes and prints the tables and samples; plots the loss curves."""
  if scale in table2.SCALES:
    table2.report(records, folder, scale)
    return
  order = list(switch_off.ROWS)
  records = sorted(records, key=lambda record: order.index(record.trial.row))
  text = ""
  for group in dict.fromkeys(record.trial.group for record in records):
    columns, extra = COLUMNS, paper_lines()
    if group == RECALL:
      columns, extra = RECALL_COLUMNS, []
    table = tables.table(records, group, columns, extra)
    text += f"{group}\n\n{table}\n"
    rows = tables.final_by_row(records, group)
    picture = f"loss_{slug(group.partition(',')[0])}.png"
    plots.loss_curves(folder / picture, rows, f"{group}, scale {scale}")
  text += f"{PAPER_NOTE}\n{tables.caption(records)}"
  samples = {
    record.trial.row: sample(record)
    for record in tables.final(records)
    if record.trial.row == "Hope"
    and record.trial.group != RECALL
    and scale != "cpu"
  }
  extra = {"samples": samples} if samples else {}
  tables.publish(folder, "language_modeling", records, text, **extra)
  for row, written in samples.items():
    print(f"\n{row} writes:\n\n{written}")


def main(argv: Sequence[str] | None = None) -> int:
  flags = runner.arguments("language_modeling", SCALES, argv)
  plans = {flags.scale: lambda: make_plan(flags)}
  is_table2 = flags.scale in table2.SCALES
  folder = f"results_{flags.scale}" if is_table2 else "results"
  return runner.main(
    "language_modeling", plans, report, argv, prepare, folder=folder
  )


if __name__ == "__main__":
  sys.exit(main())
