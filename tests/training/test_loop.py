import dataclasses
import json
import math
import signal

import jax
import numpy as np
import pytest

from hope_jax import config as config_lib
from hope_jax.config import ConfigError
from hope_jax.runs import checkpoints, interruption
from hope_jax.training import loop, metrics, sharding, step

pytestmark = pytest.mark.optimized

# What differs between two runs of the same computation.
CLOCK = ("seconds", "tokens_per_second", "model_flops_per_second")


class Killed(Exception):
  """Stands for a machine that goes away."""


def without_clock(record):
  return {k: v for k, v in record.items() if k not in CLOCK}


def final_state(config, workdir):
  mesh = sharding.make_mesh(config.mesh)
  manager = checkpoints.open_manager(workdir, config.train)
  abstract = step.build(config, mesh).abstract_state
  state = checkpoints.restore(manager, abstract)
  manager.close()
  return jax.device_get(state)


def kill_at(monkeypatch, number):
  """Makes the training step after update `number` fail."""
  real = step.build

  def build(config, mesh):
    compiled = real(config, mesh)

    def train_step(state, batch):
      if int(state.step) == number:
        raise Killed
      return compiled.train_step(state, batch)

    return compiled._replace(train_step=train_step)

  monkeypatch.setattr(step, "build", build)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Folder and result of the tiny run, uninterrupted, by config."""
  done = {}

  def get(config):
    if config not in done:
      folder = tmp_path_factory.mktemp("finished")
      done[config] = folder, loop.run(config, folder)
    return done[config]

  return get


def test_train_writes_the_promised_result(tiny, finished):
  folder, result = finished(tiny)
  assert json.loads((folder / "result.json").read_text()) == result | {
    "config": json.loads(json.dumps(result["config"]))
  }
  assert result["tokens"] == 6 * 4 * 32 and result["steps"] == 6
  assert result["model"] == "transformer" and result["seed"] == 0
  assert result["parameters"] == step.count_parameters(
    final_state(tiny, folder).params
  )
  assert result["perplexity"] == math.exp(result["test_loss"])
  assert result["bits_per_byte"] == result["test_loss"] / math.log(2)
  assert 0 <= result["accuracy"] <= 1
  assert result["tokens_per_second"] > 0 and result["flops_per_token"] > 0
  stored = config_lib.from_config_dict(
    json.loads((folder / "config.json").read_text())
  )
  assert stored == tiny


def test_train_logs_on_schedule(tiny, finished):
  records = metrics.read(finished(tiny)[0])
  steps = {
    kind: [r["step"] for r in records if r["kind"] == kind]
    for kind in ("train", "eval")
  }
  assert steps == {"train": [1, 2, 4, 6], "eval": [3, 6, 6]}
  assert [r.get("split") for r in records if r["kind"] == "eval"] == [
    "valid",
    "valid",
    "test",
  ]


def test_train_writes_metrics_one_step_late(tiny, tmp_path, monkeypatch):
  """The newest record on disk when each of the 6 steps is dispatched."""
  newest = []
  real = step.build

  def build(config, mesh):
    compiled = real(config, mesh)

    def train_step(state, batch):
      newest.append(max([r["step"] for r in metrics.read(tmp_path)] or [0]))
      return compiled.train_step(state, batch)

    return compiled._replace(train_step=train_step)

  monkeypatch.setattr(step, "build", build)
  train = dataclasses.replace(tiny.train, eval_every=0, checkpoint_every=0)
  loop.run(dataclasses.replace(tiny, train=train), tmp_path)
  assert newest == [0, 0, 1, 2, 2, 4]


@pytest.mark.parametrize("killed_after", [1, 3, 5])
def test_resume_equals_uninterrupted_bit_for_bit(
  tiny, finished, tmp_path, monkeypatch, killed_after
):
  folder, result = finished(tiny)
  with monkeypatch.context() as patch:
    kill_at(patch, killed_after)
    with pytest.raises(Killed):
      loop.run(tiny, tmp_path)
  assert not (tmp_path / "result.json").exists()
  resumed = loop.run(tiny, tmp_path)
  assert without_clock(resumed) == without_clock(result)
  assert [without_clock(r) for r in metrics.read(tmp_path)] == [
    without_clock(r) for r in metrics.read(folder)
  ]
  jax.tree.map(
    np.testing.assert_array_equal,
    final_state(tiny, folder),
    final_state(tiny, tmp_path),
  )


def signal_at(monkeypatch, number, *signals):
  """Sends this process `signals` during update `number`."""
  real = step.build

  def build(config, mesh):
    compiled = real(config, mesh)

    def train_step(state, batch):
      if int(state.step) + 1 == number:
        for each in signals:
          signal.raise_signal(each)
      return compiled.train_step(state, batch)

    return compiled._replace(train_step=train_step)

  monkeypatch.setattr(step, "build", build)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signal_saves_and_the_run_resumes_bit_for_bit(
  tiny, finished, tmp_path, monkeypatch, name
):
  folder, result = finished(tiny)
  before = [signal.getsignal(each) for each in interruption.CODES]
  with monkeypatch.context() as patch:
    signal_at(patch, 3, getattr(signal, name))
    with pytest.raises(interruption.Interrupted, match="step 3"):
      loop.run(tiny, tmp_path)
  assert [signal.getsignal(each) for each in interruption.CODES] == before
  assert (tmp_path / "checkpoints" / "3").is_dir()
  assert without_clock(loop.run(tiny, tmp_path)) == without_clock(result)
  jax.tree.map(
    np.testing.assert_array_equal,
    final_state(tiny, folder),
    final_state(tiny, tmp_path),
  )


def test_second_signal_stops_at_once(tiny, tmp_path, monkeypatch):
  signal_at(monkeypatch, 3, signal.SIGINT, signal.SIGINT)
  with pytest.raises(KeyboardInterrupt) as stopped:
    loop.run(tiny, tmp_path)
  assert stopped.type is KeyboardInterrupt
  assert not (tmp_path / "checkpoints" / "3").exists()


def test_resume_starts_from_the_checkpoint(tiny, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    kill_at(patch, 5)
    with pytest.raises(Killed):
      loop.run(tiny, tmp_path)
  seen = []
  real = step.build

  def build(config, mesh):
    compiled = real(config, mesh)

    def train_step(state, batch):
      seen.append(int(state.step))
      return compiled.train_step(state, batch)

    return compiled._replace(train_step=train_step)

  monkeypatch.setattr(step, "build", build)
  loop.run(tiny, tmp_path)
  assert seen == [4, 5]


def test_train_again_changes_nothing(tiny, finished, capsys):
  folder, result = finished(tiny)
  before = (folder / "metrics.jsonl").read_text()
  again = loop.run(tiny, folder)
  assert "finished" in capsys.readouterr().out
  assert again["test_loss"] == result["test_loss"]
  assert (folder / "metrics.jsonl").read_text() == before


def test_train_refuses_the_folder_of_another_run(tiny, finished):
  folder, _ = finished(tiny)
  other = dataclasses.replace(
    tiny, opt=dataclasses.replace(tiny.opt, peak_lr=1e-3)
  )
  with pytest.raises(ConfigError, match="opt.peak_lr=0.01, not 0.001"):
    loop.run(other, folder)


def test_train_keeps_the_newest_checkpoints(tiny, finished):
  folder, _ = finished(tiny)
  kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
  assert kept == ["4", "6"]


def test_train_works_without_intermediate_events(tiny, tmp_path):
  """0 switches an event off; the shortest run still has a result."""
  train = dataclasses.replace(
    tiny.train, steps=1, eval_every=0, checkpoint_every=0, dynamics_every=0
  )
  result = loop.run(dataclasses.replace(tiny, train=train), tmp_path)
  assert result["tokens_per_second"] > 0
  assert (tmp_path / "checkpoints" / "1").is_dir()


def test_run_on_a_text_that_changed_is_refused(tiny, tmp_path, monkeypatch):
  text = tmp_path / "text.txt"
  text.write_text("To be, or not to be. " * 200)
  config = dataclasses.replace(
    tiny, data=dataclasses.replace(tiny.data, path=str(text))
  )
  with monkeypatch.context() as patch:
    kill_at(patch, 3)
    with pytest.raises(Killed):
      loop.run(config, tmp_path / "run")
  text.write_text("To be, or not to bee " * 200)
  with pytest.raises(ConfigError, match="another content than data.path"):
    loop.run(config, tmp_path / "run")
