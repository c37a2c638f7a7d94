"""The commands as a user runs them, and what is behind their flags."""

import dataclasses
import importlib
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags

from hope_jax import cli, evaluate
from hope_jax.config import (
  CMSConfig,
  Config,
  ConfigError,
  DataConfig,
  EvalConfig,
  MemoryConfig,
  ModelConfig,
)
from hope_jax.inference import evaluation, generation, variants
from hope_jax.inference import texts as texts_lib
from hope_jax.runs import checkpoints, workdir
from hope_jax.training import sharding, step

pytestmark = pytest.mark.optimized

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
CONFIG = """
import ml_collections

def get_config(mode="transformer"):
  if mode not in ("transformer", "hope_attention"):
    raise ValueError(f"mode {mode!r} does not exist")
  return ml_collections.ConfigDict({
    "model": {"sequence_layer": mode, "width": 16, "num_layers": 1,
              "num_heads": 1, "ffn_hidden": 16, "context_length": 64},
    "opt": {"peak_lr": 1e-2},
    "data": {"sequence_length": 32, "batch_size": 2},
    "train": {"steps": 3, "log_every": 1, "eval_every": 2},
    "eval": {"batches": 1, "batch_size": 2},
  })
"""


def command(name, *flags, cwd):
  """Runs `python -m hope_jax.<name>` somewhere else than the repository."""
  return subprocess.run(
    [sys.executable, "-m", f"hope_jax.{name}", *flags],
    cwd=cwd,
    env=os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


@pytest.fixture
def here(home, monkeypatch, capfd):
  """Runs a command up to its error, in `home`, without a process of its own;
  returns its exit code and what it wrote to stderr."""

  def leave(code):
    raise SystemExit(code)

  def run(name, *arguments):
    module = importlib.import_module(f"hope_jax.{name}")
    monkeypatch.setattr(sys, "argv", [f"hope_jax.{name}", *arguments])
    module.define_flags()
    with pytest.raises(SystemExit) as exit_:
      cli.run(module.main)
    return exit_.value.code, capfd.readouterr().err

  known = set(flags.FLAGS)
  monkeypatch.chdir(home)
  monkeypatch.setattr(os, "_exit", leave)
  yield run
  for name in set(flags.FLAGS) - known:
    delattr(flags.FLAGS, name)
  flags.FLAGS.unparse_flags()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with a config, `small.py`, and a finished run, `run`."""
  folder = tmp_path_factory.mktemp("home")
  (folder / "small.py").write_text(CONFIG)
  child = command(
    "train",
    "--config=small.py:transformer",
    "--workdir=run",
    "--config.train.steps=4",
    cwd=folder,
  )
  assert child.returncode == 0, child.stderr
  assert "step 4/4" in child.stdout
  return folder


def test_train_applies_overrides(home):
  result = json.loads((home / "run" / "result.json").read_text())
  assert result["steps"] == 4 and result["config"]["opt"]["peak_lr"] == 1e-2


MODEL = "transformer: 1 layer of width 16"


@pytest.mark.parametrize(
  ("name", "arguments", "first"),
  [
    ("evaluate", [], f"evaluating {MODEL}, test split, workdir run"),
    (
      "generate",
      ["--prompt=a", "--prompt=b", "--tokens=9"],
      f"generating with {MODEL}, up to 2 x 9 tokens, workdir run",
    ),
    ("export", ["--output=x"], f"exporting {MODEL}, workdir run, to x"),
    (
      "session",
      ["--session=s", "--new"],
      f"session s with {MODEL}, workdir run",
    ),
  ],
)
def test_commands_say_model_devices_and_parameters_first(
  home, here, monkeypatch, name, arguments, first
):
  """All of it before the checkpoint is read."""

  def fail(*args):
    raise ConfigError("enough")

  monkeypatch.setattr(checkpoints, "restore_params", fail)
  code, text = here(name, "--workdir=run", *arguments)
  said, on, *more = text.splitlines()
  device = jax.devices()[0].device_kind
  count = 1
  if name == "evaluate":  # which takes the run's mesh
    count = sharding.mesh_or_default(workdir.read_config(home / "run")).size
  assert (code, said, on) == (2, first, f"on {count} x {device}")
  result = json.loads((home / "run" / "result.json").read_text())
  assert more[-2:] == [f"{result['parameters']:,} parameters", "error: enough"]


def test_train_again_says_finished(home):
  child = command(
    "train",
    "--config=small.py",
    "--workdir=run",
    "--config.train.steps=4",
    cwd=home,
  )
  assert child.returncode == 0 and "finished" in child.stdout


@pytest.mark.parametrize(
  ("name", "arguments", "message"),
  [
    (
      "train",
      ["--config=small.py", "--workdir=new", "--config.opt.peak_lrr=1"],
      "'opt.peak_lrr'; did you mean 'peak_lr'?",
    ),
    (
      "train",
      ["--config=small.py", "--workdir=new", "--config.opz.peak_lr=1"],
      "opz",
    ),
    (
      "train",
      ["--config=small.py", "--workdir=new", "--config.opt.peak_lr=high"],
      "peak_lr=high",
    ),
    ("train", ["--config=small.py:nope", "--workdir=new"], "mode 'nope'"),
    ("train", ["--config=none.py", "--workdir=new"], "none.py"),
    ("train", ["--config=small.py"], "--workdir"),
    ("train", ["--config=small.py", "--workdir=run"], "train.steps=4, not 3"),
    (
      "train",
      ["--config=small.py", "--workdir=new", "--config.data.path=no.txt"],
      "no.txt",
    ),
    ("train", ["--config=small.py", "--workdir=new", "more"], "'more'"),
    ("evaluate", ["--workdir=new"], "not the folder of a run"),
    ("evaluate", ["--workdir=run", "--level=memory"], "--writes=off"),
    ("evaluate", ["--workdir=run", "--writes=off"], "no level"),
    ("evaluate", ["--workdir=run", "--split=train"], "split"),
    ("evaluate", ["--workdir=run", "--length=0"], "data.sequence_length"),
    ("evaluate", ["--workdir=run", "--dynamics"], "no level"),
    ("generate", ["--workdir=run", "--prompt="], "--prompt is empty"),
    (
      "generate",
      ["--workdir=run", "--prompt=a", "--tokens=99"],
      "context_length=64",
    ),
    (
      "generate",
      ["--workdir=run", "--prompt=a", "--top_p=0"],
      "--top_p=0.0",
    ),
  ],
)
def test_command_error_is_one_line_and_code_2(
  home, here, name, arguments, message
):
  code, text = here(name, *arguments)
  *before, last = text.strip().splitlines()  # what it is going to do
  assert code == 2, text
  assert last.startswith("error: ") and message in last
  assert not any("error" in line or "Traceback" in line for line in before)
  assert not (home / "new").exists()


@pytest.mark.parametrize("name", ["train", "evaluate", "generate"])
def test_command_error_ends_the_process(home, name):
  child = command(name, cwd=home)
  assert child.returncode == 2 and not child.stdout
  (line,) = child.stderr.splitlines()
  assert line.startswith("error: ") and "--workdir" in line


def test_evaluate_repeats_the_test_loss(home):
  child = command("evaluate", "--workdir=run", "--output=scores.json", cwd=home)
  assert child.returncode == 0, child.stderr
  scores = json.loads(child.stdout)
  assert scores == json.loads((home / "scores.json").read_text())
  result = json.loads((home / "run" / "result.json").read_text())
  for ours, theirs in (
    ("loss", "test_loss"),
    ("accuracy", "accuracy"),
    ("bits_per_byte", "bits_per_byte"),
  ):
    np.testing.assert_allclose(scores[ours], result[theirs], rtol=1e-6)
  assert scores["split"] == "test" and scores["step"] == 4


def test_evaluation_that_is_not_finite_is_null_and_code_1(
  home, here, monkeypatch
):
  """What is finite is shown, but no file says that it was evaluated."""
  scores = {"step": 4, "loss": math.nan, "dynamics": {"half_life": math.inf}}
  shown = []
  monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: scores)
  monkeypatch.setattr(evaluate, "print", shown.append, raising=False)
  code, text = here("evaluate", "--workdir=run", "--output=bad.json")
  assert code == 1
  *_, line = text.strip().splitlines()
  assert line.startswith("error: the test loss of run is not finite")
  (found,) = map(strict_json, shown)
  assert found["loss"] is None and found["dynamics"] == {"half_life": None}
  assert found["step"] == 4 and not (home / "bad.json").exists()


def strict_json(text):
  """JSON as other programs read it, without NaN."""
  return json.loads(text, parse_constant=lambda name: pytest.fail(name))


def test_generate_continues_the_prompt_and_repeats_by_seed(home):
  flags = ["--workdir=run", "--prompt=ROMEO: ü", "--tokens=20"]
  first, second, other = (
    command("generate", *flags, f"--seed={seed}", cwd=home)
    for seed in (1, 1, 2)
  )
  assert first.returncode == 0, first.stderr
  assert first.stdout.startswith("ROMEO: ü")
  assert first.stdout == second.stdout != other.stdout


def test_switch_off_all_or_some_levels():
  cms = CMSConfig(hidden=(8, 8), chunk_lengths=(16, 0))
  memory = MemoryConfig(adaptive=())
  model = ModelConfig(sequence_layer="titans", cms=cms, memory=memory)
  assert not variants.switch_off(model, ()).is_live("memory")
  some = variants.switch_off(model, ("cms_0",))
  assert some.is_live("memory") and not some.is_live("cms_0")
  with pytest.raises(ConfigError, match="'k' does not exist"):
    variants.switch_off(model, ("k",))


def test_lengthen_keeps_the_optimizers_levels_slow():
  cms = CMSConfig(hidden=(8, 8, 8), chunk_lengths=(16, 512, 0), step_tokens=256)
  memory = MemoryConfig(adaptive=())
  config = Config(
    model=ModelConfig(sequence_layer="titans", cms=cms, memory=memory),
    data=DataConfig(sequence_length=32, batch_size=8),
  )
  longer = variants.lengthen(config, 64)
  assert longer.data.sequence_length == 64
  assert longer.model.cms.fast_lengths == (16,)
  assert longer.model.cms.levels == 3


@pytest.fixture(scope="module")
def titans(tmp_path_factory):
  """Folder of a Titans run that has a checkpoint of its initial state."""
  folder = tmp_path_factory.mktemp("titans")
  memory = MemoryConfig(
    adaptive=(), target="shared", delta_rule="none", chunk_length=8
  )
  config = Config(
    model=ModelConfig(
      sequence_layer="titans",
      width=16,
      num_layers=1,
      ffn_hidden=16,
      context_length=64,
      memory=memory,
    ),
    data=DataConfig(sequence_length=32),
    eval=EvalConfig(batches=1, batch_size=2),
  )
  workdir.claim(folder, config, {})
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  compiled = step.build(config, mesh)
  with sharding.activate(mesh):
    state = compiled.init(jax.random.key(0))
  manager = checkpoints.open_manager(folder, config.train)
  checkpoints.save(manager, 0, state)
  manager.close()
  return folder, config


def test_evaluate_without_writes_scores_another_model(titans):
  folder, config = titans
  losses = [evaluation.evaluate(config, folder, "test")["loss"]]
  for levels in ((), ("memory",)):
    model = variants.switch_off(config.model, levels)
    changed = dataclasses.replace(config, model=model)
    losses.append(evaluation.evaluate(changed, folder, "test")["loss"])
  assert losses[0] != losses[1]
  assert losses[1] == losses[2]  # its only level is all of it


def test_evaluate_elsewhere_reads_the_other_data(titans, tmp_path):
  folder, config = titans
  for split in ("train", "valid", "test"):
    (tmp_path / f"{split}.txt").write_text("another text " * 12)
  other = variants.elsewhere(config, str(tmp_path))
  scores = [evaluation.evaluate(c, folder, "test") for c in (config, other)]
  assert scores[0]["loss"] != scores[1]["loss"]
  mqar = dataclasses.replace(config.data, kind="mqar")
  with pytest.raises(ConfigError, match="--path is for data that is read"):
    variants.elsewhere(dataclasses.replace(config, data=mqar), "x")


def test_evaluate_at_another_length_reads_as_many_tokens(titans):
  folder, config = titans  # batches of 2 x 32 tokens
  longer = variants.lengthen(config, 64)
  scores = evaluation.evaluate(
    longer, folder, "test", with_dynamics=True, with_positions=True
  )
  (found,) = scores["by_position"]
  assert found == {"end": 64} | {
    key: scores[key] for key in found if key != "end"
  }
  assert scores["targets"] == 64
  flat, change = scores["dynamics"], scores["relative_change"]
  assert change == {"memory": flat["dynamics/layer_0/memory/relative_change"]}
  assert change["memory"] > 0
  mqar = dataclasses.replace(config.data, kind="mqar")
  with pytest.raises(ConfigError, match="--length is for text"):
    variants.lengthen(dataclasses.replace(config, data=mqar), 64)


def test_generate_with_a_memory_goes_beyond_the_context_length(titans):
  folder, config = titans
  texts = texts_lib.generate(
    folder,
    ["To be, or not", "é"],
    count=100,
    sampling=generation.Sampling(),
  )
  assert config.model.context_length < 100
  assert all(len(text) > 20 for text in texts)


def test_generate_several_prompts_are_lines_of_json(home):
  (home / "prompts.txt").write_text("ROMEO:\nTo be\n")
  child = command(
    "generate",
    "--workdir=run",
    "--prompt_file=prompts.txt",
    "--tokens=5",
    "--stop=\n",
    cwd=home,
  )
  assert child.returncode == 0, child.stderr
  lines = [json.loads(line) for line in child.stdout.splitlines()]
  assert [line["prompt"] for line in lines] == ["ROMEO:", "To be"]
  assert not any("\n" in line["text"] for line in lines)
