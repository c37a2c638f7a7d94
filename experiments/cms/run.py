"""The twin gate of the CMS: its wirings and signals, with no other memory.

python -m experiments.cms.run --jobs=2

Trains Hope with the writes of all other levels off, on recall and on text.
Writes results.json and table.md; see README.md for the protocol.
"""

import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from experiments.lib import runner, switch_off, tables
from experiments.lib.results import Record
from experiments.lib.trials import Evaluation, Plan, Trial, slug

RECALL, TEXT = "recall, 8 pairs", "tiny Shakespeare, T 1024"
CONFIGS = {
  RECALL: ("configs/mqar.py", "hope", "hope,smoke"),
  TEXT: ("configs/shakespeare.py", "hope,long", "hope,smoke"),
}
OTHERS = ("memory", "k", "v", "eta", "alpha")
LEVELS = ("cms_0", "cms_1")
BUDGET = {
  # Chunks of one and two facts; the associative signal needs them short.
  RECALL: {
    "train.steps": 350,
    "data.mqar.stage_examples": 2400,
    "model.cms.chunk_lengths": (4, 8, 0),
  },
  TEXT: {"train.steps": 180},
}
# Row -> fields of the CMS.  A linear map of the values costs some width.
ROWS: dict[str, dict[str, Any]] = {
  "mixer_linear": {"value": "mixer_linear", "hidden": (64, 64, 64)},
  "mixer_value": {"value": "mixer_value"},
  "mixer_pair": {"value": "mixer_pair"},
  "next_token": {"signal": "next_token"},
}


def trial(group: str, row: str, switch: str, seed: int) -> Trial:
  """One row; `twin` is the same model that never writes."""
  config, mode, smoke = CONFIGS[group]
  fields = {"signal": "associative", **ROWS.get(row, {})}
  overrides = {f"model.cms.{name}": value for name, value in fields.items()}
  if row == "twin":
    overrides |= switch_off.TWIN
  else:
    overrides["model.frozen_levels"] = OTHERS
  flags = ("--split=test", "--writes=off", "--level=")
  named = {"": ",".join(LEVELS), **{f"_{level}": level for level in LEVELS}}
  offs = [
    Evaluation(f"off{e}", (*flags[:2], flags[2] + n)) for e, n in named.items()
  ]
  return Trial(
    group=group,
    row=row,
    name=f"{slug(group.split(',')[0])}/{row}-{seed}",
    config=config,
    mode=smoke if switch else mode,
    overrides={
      "train.keep_checkpoints": 1,
      **({} if switch else BUDGET[group]),
      **overrides,
    },
    seed=seed,
    evaluations=() if row == "twin" else tuple(offs),
  )


def plan(switch: str = "", seeds: Sequence[int] = (0,)) -> Plan:
  """All rows of both groups, seed by seed."""
  trials = [
    trial(group, row, switch, seed)
    for seed in seeds
    for group in CONFIGS
    for row in (*ROWS, "twin")
  ]
  return lambda _: trials


PLANS = {
  "cpu": plan,
  "seeds": functools.partial(plan, seeds=(0, 1, 2)),
  "smoke": functools.partial(plan, switch=",smoke"),
}

COLUMNS = {
  "test loss": lambda scores: tables.mean_std(s["loss"] for s in scores),
  "accuracy %": tables.accuracy,
}


def report(records: Sequence[Record], folder: pathlib.Path, scale: str) -> None:
  """Writes and prints the tables."""
  text = "".join(
    f"{group}\n\n{tables.table(records, group, COLUMNS)}\n" for group in CONFIGS
  )
  text += tables.caption(records)
  tables.publish(folder, "cms", records, text)


def main(argv: Sequence[str] | None = None) -> int:
  return runner.main("cms", PLANS, report, argv)


if __name__ == "__main__":
  sys.exit(main())
