"""Trains the models of Table 2 on small text, with twins and switch-offs.

python -m experiments.language_modeling.run --scale=demo
python -m experiments.language_modeling.run --scale=cpu --data=FOLDER

Writes results.json, table.md and PNG plots; see README.md for the protocol.
"""

import math
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Sequence

from experiments import plots, runner, switch_off, tables
from experiments.trials import ROOT, Plan, slug, staged

# The longest first: what follows fills the other cores.
DEMO_ROWS = ("Hope", "Titans", "Transformer++", "Transformer++ conv")
RATES = (2e-3, 4e-3, 8e-3)
SEEDS = (0, 1, 2)
# Of 2 x 1024 tokens: 0.37M, a third of an epoch of tiny Shakespeare.
STEPS = 180
PROMPT, SAMPLE_TOKENS = "ROMEO:", 400

# Table 2: model, parameters, tokens, WikiText perplexity, mean accuracy of
# the reasoning tasks (340M: NeurIPS version and Titans paper).
PAPER = (
  ("Transformer++", "340M", "15B", 31.52, 42.92),
  ("Titans (LMM)", "340M", "15B", 26.18, 46.17),
  ("Hope", "340M", "15B", 26.05, 46.90),
  ("Transformer++", "1.3B", "100B", 17.92, 53.38),
  ("Titans", "1.3B", "100B", 15.60, 56.82),
  ("Hope", "1.3B", "100B", 14.39, 58.04),
)
PAPER_NOTE = """\
Rows "paper" are Table 2's, for reference: WikiText perplexity per subword
(and mean accuracy on the reasoning tasks) after training on web text.  They
do not compare with perplexities per byte.
"""


def demo_plan(switch: str = "") -> Plan:
  """Four models at equal tokens, one seed, the config's learning rates."""
  trials = [
    switch_off.trial(
      row,
      group="tiny Shakespeare",
      name=slug(f"tiny Shakespeare/{row}"),
      config="configs/shakespeare.py",
      suffix=switch,
      overrides={},
      evaluations=(),
    )
    for row in DEMO_ROWS
  ]
  return lambda _: trials


def cpu_plan(data: str) -> Plan:
  """Two texts at T 1024: every row on the same grid, then three seeds."""
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
    for row in switch_off.ROWS
  ]
  return staged(rows, rates=RATES, seeds=SEEDS)


PLANS = {
  "demo": lambda flags: demo_plan(),
  "cpu": lambda flags: cpu_plan(flags.data),
  "smoke": lambda flags: demo_plan(",smoke"),
}


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
    math.exp(s["loss"]) for s in scores
  ),
  "bits per byte": lambda scores: tables.mean_std(
    s["loss"] / math.log(2) for s in scores
  ),
  "moved %": relative_change,
}


def paper_lines() -> list[tables.Line]:
  """Table 2's rows as lines of ours."""
  return [
    {
      "model": f"paper: {model}",
      "perplexity": f"{perplexity:.2f} ({accuracy:.2f})",
      "parameters": parameters,
      "tokens": tokens,
    }
    for model, parameters, tokens, perplexity, accuracy in PAPER
  ]


def sample(record: runner.Record) -> str:
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


def report(
  records: Sequence[runner.Record], folder: pathlib.Path, scale: str
) -> None:
  """Writes and prints everything that a reader wants to see."""
  order = list(switch_off.ROWS)
  records = sorted(records, key=lambda record: order.index(record.trial.row))
  folder.mkdir(parents=True, exist_ok=True)
  text = ""
  for group in dict.fromkeys(record.trial.group for record in records):
    table = tables.table(records, group, COLUMNS, paper_lines())
    text += f"{group}\n\n{table}\n"
    rows = {
      row: tables.final(trials)
      for row, trials in tables.by_row(records, group).items()
    }
    picture = f"loss_{group.lower().replace(' ', '_')}.png"
    plots.loss_curves(folder / picture, rows, f"{group}, scale {scale}")
  text += f"{PAPER_NOTE}\n{tables.caption(records)}"
  (folder / "table.md").write_text(text)
  samples = {
    record.trial.row: sample(record)
    for record in tables.final(records)
    if record.trial.row == "Hope" and scale != "cpu"
  }
  tables.write_results(
    folder / "results.json",
    "language_modeling",
    records,
    scale=scale,
    paper=[list(row) for row in PAPER],
    table=text,
    samples=samples,
  )
  print(f"\n{text}")
  for row, written in samples.items():
    print(f"{row} writes:\n\n{written}\n")
  print(f"written to {folder}: results.json, table.md, loss_*.png")


def main(argv: Sequence[str] | None = None) -> int:
  flags = runner.arguments("language_modeling", tuple(PLANS), argv)
  plan = PLANS[flags.scale](flags)
  experiment = runner.Runner(
    plan, flags.out, jobs=flags.jobs, budget=flags.budget
  )
  code = experiment.run()
  report(experiment.records(), flags.report, flags.scale)
  return code


if __name__ == "__main__":
  sys.exit(main())
