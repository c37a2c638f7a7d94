"""Stands in for hope_jax.train and hope_jax.evaluate in the runner's tests.

Behaves by fields of the trial: opt.peak_lr 0.5 fails, train.steps 5 leaves no
result, 7 never ends by itself, 8 not even when it is asked to, everything else
takes `train.log_every` hundredths of a second.  Every start adds its process
id to starts.txt.  The losses follow from rate and seed; the best rate is 0.002
on validation and 0.004 on test.
"""

import ast
import json
import os
import pathlib
import signal
import sys
import time

from experiments.lib import trials
from hope_jax import config as config_lib

LOSSES = {0.001: (2.0, 1.9), 0.002: (1.8, 1.7), 0.004: (1.9, 1.5)}


def _literal(text: str):
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return text


def train(flags: dict[str, str], workdir: pathlib.Path) -> None:
  path, mode = flags["config"].split(":")
  overrides = {
    key.removeprefix("config."): _literal(value)
    for key, value in flags.items()
    if key.startswith("config.")
  }
  seed = overrides.pop("train.seed")
  del overrides["data.seed"]
  trial = trials.Trial("", "", "", path, mode, overrides, seed)
  config = trials.resolve(trial)
  start = time.time()
  if config.train.steps == 8:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
  with (workdir / "starts.txt").open("a") as file:
    file.write(f"{os.getpid()}\n")
  if config.train.steps in (7, 8):
    time.sleep(60)
  if config.train.steps == 5:
    return
  if config.opt.peak_lr == 0.5:
    sys.exit("error: the loss is nan at step 3")
  time.sleep(config.train.log_every / 100)
  valid, test = LOSSES.get(config.opt.peak_lr, (2.1, 2.0))
  metrics = [
    {"step": 1, "kind": "train", "loss": 3.0},
    {"step": 2, "kind": "train", "loss": 2.5},
    {"step": 2, "kind": "eval", "split": "valid", "loss": valid},
  ]
  lines = "".join(json.dumps(row) + "\n" for row in metrics)
  (workdir / "metrics.jsonl").write_text(lines)
  result = {
    "model": config.model.sequence_layer,
    "parameters": 1000,
    "tokens": 4096,
    "valid_loss": valid + seed / 100,
    "test_loss": test + seed / 10,
    "accuracy": 0.5,
    "tokens_per_second": 100.0,
    "interval": [start, time.time()],
    "cwd": os.getcwd(),
    "config": config_lib.to_dict(config),
  }
  (workdir / "result.json").write_text(json.dumps(result))


def main(argv: list[str]) -> None:
  kind, *rest = argv
  flags = dict(flag.removeprefix("--").split("=", 1) for flag in rest)
  workdir = pathlib.Path(flags["workdir"])
  if kind == "train":
    train(flags, workdir)
  else:
    result = json.loads((workdir / "result.json").read_text())
    scores = {
      "step": result["config"]["train"]["steps"],
      "loss": 2.5,
      "accuracy": 0.25,
      "level": flags.get("level"),
    }
    pathlib.Path(flags["output"]).write_text(json.dumps(scores))


if __name__ == "__main__":
  main(sys.argv[1:])
