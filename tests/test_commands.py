"""The commands as a user runs them, and what is behind their flags."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax import evaluate, generate
from hope_jax.config import (
  CMSConfig,
  Config,
  ConfigError,
  DataConfig,
  EvalConfig,
  MemoryConfig,
  ModelConfig,
)
from hope_jax.models import language_model
from hope_jax.training import checkpoints, sharding, step, workdir

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
  ("name", "flags", "message"),
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
def test_command_error_is_one_line_and_code_2(home, name, flags, message):
  child = command(name, *flags, cwd=home)
  errors = child.stderr.strip().splitlines()
  assert child.returncode == 2, child.stderr
  assert len(errors) == 1 and errors[0].startswith("error: "), child.stderr
  assert message in errors[0]
  assert not (home / "new").exists()


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
  model = ModelConfig(sequence_layer="titans", cms=cms)
  assert not evaluate.switch_off(model, ()).is_live("memory")
  some = evaluate.switch_off(model, ("cms_0",))
  assert some.is_live("memory") and not some.is_live("cms_0")
  with pytest.raises(ConfigError, match="'k' does not exist"):
    evaluate.switch_off(model, ("k",))


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
  workdir.claim(folder, config, write=True)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  compiled = step.build(config, mesh)
  with sharding.activate(mesh):
    state = compiled.init(jax.random.key(0))
  manager = checkpoints.open_manager(folder, keep=1)
  checkpoints.save(manager, 0, state)
  manager.close()
  return folder, config


def test_evaluate_without_writes_scores_another_model(titans):
  folder, config = titans
  losses = [evaluate.evaluate(config, folder, "test")["loss"]]
  for levels in ((), ("memory",)):
    model = evaluate.switch_off(config.model, levels)
    changed = dataclasses.replace(config, model=model)
    losses.append(evaluate.evaluate(changed, folder, "test")["loss"])
  assert losses[0] != losses[1]
  assert losses[1] == losses[2]  # its only level is all of it


def test_evaluate_at_another_length_reads_as_many_tokens(titans):
  folder, config = titans  # batches of 2 x 32 tokens
  longer = evaluate.lengthen(config, 64)
  scores = evaluate.evaluate(longer, folder, "test", with_dynamics=True)
  assert scores["targets"] == 64
  flat, change = scores["dynamics"], scores["relative_change"]
  assert change == {"memory": flat["dynamics/layer_0/memory/relative_change"]}
  assert change["memory"] > 0
  mqar = dataclasses.replace(config.data, kind="mqar")
  with pytest.raises(ConfigError, match="--length is for text"):
    evaluate.lengthen(dataclasses.replace(config, data=mqar), 64)


def test_generate_with_a_memory_goes_beyond_the_context_length(titans):
  folder, config = titans
  text = generate.generate(
    folder,
    "To be, or not",
    count=100,
    sampling=generate.Sampling(),
  )
  assert config.model.context_length < 100
  assert len(text) > 20


def test_continue_tokens_greedy_equals_full_passes():
  config = ModelConfig(width=16, num_layers=2, num_heads=2, ffn_hidden=16)
  model = language_model.LanguageModel(config)
  prompt = jnp.array([5, 1, 7, 200, 31])
  params = model.init(jax.random.key(0), prompt[None])["params"]
  # So large that what comes next depends on all that went before.
  params["blocks"]["mixer"] = jax.tree.map(
    lambda x: 30 * x, params["blocks"]["mixer"]
  )
  got = generate.continue_tokens(
    params,
    prompt,
    jax.random.key(0),
    config=config,
    count=8,
    sampling=generate.Sampling(temperature=0.0),
  )
  tokens = jnp.zeros(13, jnp.int32).at[:5].set(prompt)
  apply = jax.jit(lambda x: model.apply({"params": params}, x[None]).logits[0])
  for position in range(5, 13):  # causal: what follows does not matter
    token = jnp.argmax(apply(tokens)[position - 1])
    tokens = tokens.at[position].set(token)
  np.testing.assert_array_equal(got, tokens[5:])
  assert len(set(got.tolist())) > 4


PROBABILITY = np.array([0.05, 0.4, 0.1, 0.3, 0.15])


@pytest.mark.parametrize(
  ("sampling", "kept"),
  [
    (generate.Sampling(), {0, 1, 2, 3, 4}),
    (generate.Sampling(temperature=0.0), {1}),
    (generate.Sampling(top_k=2), {1, 3}),
    (generate.Sampling(top_k=99), {0, 1, 2, 3, 4}),
    (generate.Sampling(top_p=0.39), {1}),
    (generate.Sampling(top_p=0.6), {1, 3}),
    (generate.Sampling(top_p=0.8), {1, 3, 4}),
    (generate.Sampling(top_k=3, top_p=0.9), {1, 3, 4}),
    (generate.Sampling(top_k=2, top_p=0.5), {1}),
  ],
)
def test_draw_keeps_the_likeliest(sampling, kept):
  keys = jax.random.split(jax.random.key(0), 3000)
  logits = jnp.log(jnp.asarray(PROBABILITY, jnp.float32))
  drawn = jax.vmap(lambda key: generate.draw(key, logits, sampling))(keys)
  counts = np.bincount(drawn, minlength=5)
  assert set(np.nonzero(counts)[0]) == kept
  if sampling.temperature:
    want = np.where(np.isin(np.arange(5), list(kept)), PROBABILITY, 0)
    np.testing.assert_allclose(counts / 3000, want / want.sum(), atol=0.03)


def test_draw_temperature_sharpens():
  keys = jax.random.split(jax.random.key(0), 3000)
  logits = jnp.log(jnp.asarray(PROBABILITY, jnp.float32))
  drawn = jax.vmap(
    lambda key: generate.draw(key, logits, generate.Sampling(0.5))
  )(keys)
  want = PROBABILITY**2 / (PROBABILITY**2).sum()
  counts = np.bincount(drawn, minlength=5)
  np.testing.assert_allclose(counts / 3000, want, atol=0.03)
