"""Makes the files of this folder: what commit c92f371 trained, read and said.

They were made once, and are made again only to add to them, in a checkout of
that commit (git worktree add FOLDER c92f371) with the requirements of today:

cd FOLDER && python HERE/make.py [PART ...]

`HERE` is this folder, a part `configs`, `runs/living` or `first_steps/hope`;
without parts it makes all (ten minutes on two cores).  Every command runs as
its user would have run it then:

  configs.json  what command lines of `train` resolved to, as differences from
                the defaults of then
  values.json   other command lines, and the numbers and texts that they gave
  RUN.tar.xz    `run`, the folder of a run as a kill after its last checkpoint
                but one leaves it, and `session`, which has read a text with it
"""

import importlib
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

HERE = pathlib.Path(__file__).resolve().parent

# Read in pieces of 64, 64 and 8 tokens, which end in the middle of a chunk;
# the question is another piece of 8.
TEXT = (
  "The rest is silence, or so he said when it was over; and then no more.\n"
  "Speak, I charge thee, speak! What is past is prologue, all of it\n"
)
QUESTION = "JULIET:\n"
ASKED = ["--tokens=24", "--seed=3"]

# Small models, whatever the config's sizes and chunks become.
SMALL = {
  "model.width": "16",
  "model.num_layers": "1",
  "model.num_heads": "2",
  "model.memory.chunk_length": "16",
  "model.memory.projection_chunk_length": "32",
  "opt.warmup_steps": "2",
  "data.sequence_length": "64",
  "data.batch_size": "2",
  "eval.batches": "2",
  "eval.batch_size": "4",
}
LEVELS = {"model.cms.hidden": "8,8,16", "model.cms.chunk_lengths": "16,32,0"}
ALL_BOXES = {"model.memory.adaptive": "k,v,q,eta,alpha"}

# Runs that learned something and were killed before the last two steps.
STEPS, KILLED_AFTER = 192, 190
LONG = {
  "train.steps": str(STEPS),
  "train.log_every": "1",
  "train.eval_every": str(KILLED_AFTER),
  "train.checkpoint_every": str(KILLED_AFTER),
  "train.dynamics_every": "0",
}
RUNS = {
  # Its last steps are large, so that the optimizer's state shows in them.
  "transformer": {"model.ffn_hidden": "32", "opt.end_lr_ratio": "1.0"},
  # Next-token levels in one layer and levels below them in the other,
  # forgetting, all adaptive projections, an output matrix.
  "living": {
    **LEVELS,
    **ALL_BOXES,
    "model.num_layers": "2",
    "model.cms.half_life": "64",
    "model.tied_embeddings": "False",
  },
  # Associative levels inside each other, and no boxes for the gates.
  "nested": {
    **LEVELS,
    "model.cms.connection": "nested",
    "model.cms.signal": "associative",
    "model.memory.adaptive": "k,v",
  },
}
EVALUATIONS = {
  "transformer": [["--split=valid"], ["--split=test", "--positions"]],
  "living": [
    ["--split=valid"],
    ["--split=test", "--positions", "--dynamics"],
    ["--split=test", "--writes=off"],
    ["--split=test", "--writes=off", "--level=memory,cms_0"],
  ],
  "nested": [["--split=valid"], ["--split=test", "--writes=off"]],
}
# Name -> config, overrides: the first steps of small models.
FEW = {"train.steps": "3", "train.log_every": "1", "train.dynamics_every": "0"}
FIRST_STEPS = {
  "transformer": ("shakespeare.py:transformer,smoke", {}),
  "titans": ("shakespeare.py:titans,smoke", {}),
  "hope": (
    "shakespeare.py:hope,smoke",
    {**LEVELS, "model.cms.signal": "next_token"},
  ),
  "hope_nested": (
    "shakespeare.py:hope,smoke",
    {
      **LEVELS,
      **ALL_BOXES,
      "model.cms.connection": "nested",
      "model.cms.signal": "associative",
    },
  ),
  "hope_recall": (
    "mqar.py:hope,smoke",
    {
      **LEVELS,
      "model.vocab_size": "129",
      "data.num_pairs": "8",
      "data.train_pairs": "2,8",
      "data.stage_examples": "32",
    },
  ),
  "mamba2": ("shakespeare.py:mamba2,smoke", {"model.num_layers": "2"}),
  "rwkv7": ("shakespeare.py:rwkv7,smoke", {"model.num_layers": "2"}),
  "ttt_linear": ("shakespeare.py:ttt_linear,smoke", {}),
}

# Modes of each config beside the models' names.
MODES = {
  "shakespeare": ("", ",long", ",smoke"),
  "wikitext2": ("", ",smoke"),
  "books": ("", ",smoke"),
  "mqar": ("", "_32", "_64", ",smoke"),
  "subwords": ("", ",gpu", ",smoke"),
  "hope_340m": ("", ",smoke"),
  "hope_760m": ("", ",smoke"),
  "hope_1p3b": ("", ",smoke"),
}
MODELS = (
  *("transformer", "transformer_conv", "titans", "titans_mac", "titans_mag"),
  *("titans_mal", "dla", "memora", "ttt_linear", "ttt_mlp", "hope"),
  *("hope_attention", "retnet", "deltanet", "gated_deltanet", "comba"),
  *("mamba2", "mamba", "samba", "rwkv7", "lstm", "srwm"),
)
SOME_MODELS = "transformer", "titans", "hope", "mamba2", "ttt_linear"
OVERRIDDEN = (
  "shakespeare.py",
  "mqar.py",
  "hope_340m.py",
  "shakespeare.py:smoke",
  "shakespeare.py:hope --config.opt.peak_lr=1e-3 --config.train.seed=1",
  "shakespeare.py:hope --config.model.inner_rates=off",
  "shakespeare.py:hope --config.model.frozen_levels=memory,cms_0",
  "shakespeare.py:hope --config.model.memory.adaptive=k,v",
  "shakespeare.py:hope --config.model.memory.adaptive=",
  "shakespeare.py:hope --config.model.memory.delta_rule=none",
  "shakespeare.py:hope --config.model.memory.momentum=none",
  "shakespeare.py:hope --config.model.memory.architecture=matrix",
  "shakespeare.py:hope --config.model.cms.connection=nested",
  "shakespeare.py:hope --config.model.cms.connection=none",
  "shakespeare.py:hope --config.model.cms.signal=associative"
  " --config.model.cms.value=mixer_linear",
  "shakespeare.py:hope --config.model.cms.hidden=(64,160)"
  " --config.model.cms.chunk_lengths=(32,0)",
  "shakespeare.py:hope --config.train.carry_state=True",
  "shakespeare.py:hope,long --config.model.cms.outer_order=1"
  " --config.model.cms.learning_share=0.5",
  "shakespeare.py:transformer --config.model.num_kv_heads=1"
  " --config.model.rope_scaling.factor=8 --config.model.tied_embeddings=False",
  "shakespeare.py:transformer --config.data.path=data/a"
  " --config.data.tokenizer=data/tokenizer.json --config.model.vocab_size=512",
  "wikitext2.py:hope --config.data.path=data/wikitext2 --config.eval.batches=0",
  "mqar.py:titans --config.model.memory.setting=token_exact",
  "mqar.py:hope_32 --config.data.train_pairs=4,8,16,32",
  "mqar.py:hope --config.model.memory.setting=negative_eigenvalues"
  " --config.model.memory.initial_learn_rate=1.0",
  "hope_340m.py:hope --config.data.path=data/a --config.mesh.fsdp=8",
  "hope_1p3b.py:hope --config.mesh.fsdp=8 --config.mesh.tensor=4"
  " --config.train.accumulate=4",
  "subwords.py:hope,gpu --config.data.weights=1,2"
  " --config.data.long_share=0.25",
)


def config_lines() -> Iterator[str]:
  """`shakespeare.py:hope --config.opt.peak_lr=1e-3`, of all that is kept."""
  yield from OVERRIDDEN
  for name, modes in MODES.items():
    for mode in modes:
      is_whole = name == "shakespeare" and not mode
      for model in MODELS if is_whole else SOME_MODELS:
        yield f"{name}.py:{model}{mode}"


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested groups -> {"group.field": value}."""
  found = {}
  for key, value in values.items():
    if isinstance(value, dict):
      found |= flatten(value, f"{prefix}{key}.")
    else:
      found[prefix + key] = list(value) if isinstance(value, tuple) else value
  return found


def resolve(line: str) -> dict[str, Any]:
  """What `train --config=configs/LINE` runs, in the checkout around us."""
  from absl import flags
  from ml_collections import config_flags

  config_lib = importlib.import_module("hope_jax.config")
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config",
    flag_values=values,
    lock_config=False,
    accept_new_attributes=True,
  )
  argv = ["train", *f"--config=configs/{line}".split()]
  with mock.patch.object(sys, "argv", argv):  # where overrides are looked for
    values(argv)
  config = config_lib.from_config_dict(values.config)
  return flatten(config_lib.to_dict(config))


def defaults() -> dict[str, Any]:
  """Every field's default."""
  config_lib = importlib.import_module("hope_jax.config")
  return flatten(config_lib.to_dict(config_lib.Config()))


def resolved() -> dict[str, Any]:
  """The defaults, and how the config of each line differs from them."""
  sys.path.insert(0, ".")
  default = defaults()
  return {
    "defaults": default,
    "lines": {
      line: {k: v for k, v in resolve(line).items() if v != default[k]}
      for line in config_lines()
    },
  }


def flags_of(config: str, *overrides: dict[str, str]) -> list[str]:
  """Arguments of `train`, of several groups of overrides the last."""
  merged: dict[str, str] = {}
  for group in overrides:
    merged |= group
  named = [f"--config.{name}={value}" for name, value in merged.items()]
  return [f"--config=configs/{config}", *named]


def call(name: str, *arguments: str) -> str:
  """The stdout of a command of the checkout that this runs in."""
  command = [sys.executable, "-m", f"hope_jax.{name}", *arguments]
  print(*command[1:], flush=True)
  return subprocess.run(
    command, check=True, stdout=subprocess.PIPE, text=True
  ).stdout


def numbers_of(scores: dict[str, Any]) -> dict[str, Any]:
  """What of a result or an evaluation follows from the model alone."""
  names = "parameters", "valid_loss", "test_loss", "step", "loss", "accuracy"
  more = "relative_change", "by_position", "dynamics"
  return {name: scores[name] for name in (*names, *more) if name in scores}


def steps_of(workdir: pathlib.Path) -> list[list[float]]:
  """Step, loss and gradient norm of a run's steps."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    [record["step"], record["loss"], record["grad_norm"]]
    for record in map(json.loads, lines)
    if record["kind"] == "train"
  ]


def result_of(workdir: pathlib.Path) -> dict[str, Any]:
  return numbers_of(json.loads((workdir / "result.json").read_text()))


def first_steps(name: str, folder: pathlib.Path) -> dict[str, Any]:
  """Trains one of FIRST_STEPS."""
  workdir = folder / "run"
  config, overrides = FIRST_STEPS[name]
  arguments = flags_of(config, SMALL, FEW, overrides)
  call("train", *arguments, f"--workdir={workdir}")
  return {
    "train": arguments,
    "steps": steps_of(workdir),
    "result": result_of(workdir),
  }


def kill(workdir: pathlib.Path, after: int) -> None:
  """Makes a finished run one that was killed after step `after`."""
  (workdir / "result.json").unlink()
  metrics = workdir / "metrics.jsonl"
  lines = metrics.read_text().splitlines(keepends=True)
  kept = [line for line in lines if json.loads(line)["step"] <= after]
  metrics.write_text("".join(kept[-3:]))
  folder = workdir / "checkpoints"
  for path in sorted(folder.rglob("*"), reverse=True):
    if path.relative_to(folder).parts[0] == str(after):
      continue
    if path.is_dir():
      path.rmdir()
    else:
      path.unlink()


def whole_run(name: str, folder: pathlib.Path) -> dict[str, Any]:
  """Trains one of RUNS, lets it read a text and answer, and packs it."""
  workdir, text = folder / "run", folder / "text.txt"
  arguments = flags_of("shakespeare.py:hope", SMALL, LONG, RUNS[name])
  if name == "transformer":
    arguments[0] = "--config=configs/shakespeare.py:transformer"
  call("train", *arguments, f"--workdir={workdir}")
  found = {
    "train": arguments,
    "steps": steps_of(workdir)[KILLED_AFTER:],
    "result": result_of(workdir),
  }
  kill(workdir, KILLED_AFTER)
  text.write_text(TEXT)
  here, session = f"--workdir={workdir}", f"--session={folder / 'session'}"
  read = call("session", here, session, f"--feed={text}", "--info")
  with tarfile.open(HERE / f"{name}.tar.xz", "w:xz") as file:
    for part in ("run", "session"):
      file.add(folder / part, part, filter=_anonymous)
  question = [f"--ask={QUESTION}", *ASKED]
  prompt = [f"--prompt={QUESTION}", *ASKED]
  evaluated = [
    [flags, numbers_of(json.loads(call("evaluate", here, *flags)))]
    for flags in EVALUATIONS[name]
  ]
  return found | {
    "evaluate": evaluated,
    "generate": [prompt, call("generate", here, *prompt)],
    "ask": [question, call("session", here, session, *question)],
    "read": report(read),
    "read_again": report(
      call("session", here, session, f"--feed={text}", "--info")
    ),
  }


def report(stdout: str) -> dict[str, Any]:
  """Perplexity of the text that was read, and what the session then was."""
  line, info = stdout.splitlines()
  names = "step", "tokens", "state_bytes", "relative_change"
  described = json.loads(info)
  return {"perplexity": float(line.split()[-1])} | {
    name: described[name] for name in names
  }


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
  """Without locks, and what tells of the machine."""
  if info.name.endswith("/lock"):
    return None
  info.uid = info.gid = info.mtime = 0
  info.uname = info.gname = ""
  return info


def write(name: str, values: dict[str, dict[str, Any]]) -> None:
  """JSON with a line for each part, which `git diff` shows."""
  groups = (
    f" {json.dumps(group)}: {{\n"
    + ",\n".join(
      f"  {json.dumps(key)}: {json.dumps(value)}"
      for key, value in parts.items()
    )
    + "\n }"
    for group, parts in values.items()
  )
  (HERE / name).write_text("{\n" + ",\n".join(groups) + "\n}\n")


def main(names: list[str]) -> None:
  """All parts, or those named: `configs`, `runs/living` ..."""
  path = HERE / "values.json"
  values = {"runs": {}, "first_steps": {}}
  if names and path.exists():
    values = json.loads(path.read_text())
  parts = [("runs", whole_run, RUNS), ("first_steps", first_steps, FIRST_STEPS)]
  if not names or "configs" in names:
    write("configs.json", resolved())
  for group, make, known in parts:
    for name in known:
      if names and f"{group}/{name}" not in names:
        continue
      with tempfile.TemporaryDirectory() as folder:
        values[group][name] = make(name, pathlib.Path(folder))
      write("values.json", values)


if __name__ == "__main__":
  main(sys.argv[1:])
