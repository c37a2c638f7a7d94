"""Faults on purpose: what a run loses, says and leaves behind."""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from hope_jax import config as config_lib
from hope_jax.config import ConfigError
from hope_jax.training import faults, loop, metrics, step, workdir
from tests.training.test_loop import (
  Killed,
  final_state,
  kill_at,
  without_clock,
)

pytestmark = pytest.mark.optimized

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def with_train(config, **fields):
  train = dataclasses.replace(config.train, **fields)
  return dataclasses.replace(config, train=train)


def spoil(monkeypatch, is_bad, change):
  """Changes (state, scalars, batch) of the steps whose number is bad."""
  real = step.build

  def build(config, mesh):
    compiled = real(config, mesh)

    def train_step(state, batch):
      number = int(state.step) + 1
      if is_bad(number):
        return change(compiled.train_step, state, batch)
      return compiled.train_step(state, batch)

    return compiled._replace(train_step=train_step)

  monkeypatch.setattr(step, "build", build)


def without_numbers(train_step, state, batch):
  return train_step(state, batch | {"weights": batch["weights"] * math.nan})


# ------------------------------------------------------------- numbers


def test_step_without_finite_loss_changes_nothing_and_counts(
  tiny, tmp_path, monkeypatch
):
  spoil(monkeypatch, lambda n: n in (3, 4), without_numbers)
  config = with_train(tiny, log_every=1, checkpoint_every=1, keep_checkpoints=9)
  result = loop.run(config, tmp_path)
  assert result["bad_steps"] == 2 and math.isfinite(result["test_loss"])
  train = [r for r in metrics.read(tmp_path) if r["kind"] == "train"]
  assert [r["loss"] is None for r in train] == [
    n in (3, 4) for n in range(1, 7)
  ]
  assert [r["bad_in_a_row"] for r in train] == [0, 0, 1, 2, 0, 0]
  manager = loop.checkpoints.open_manager(tmp_path, config.train)
  weights = [
    manager.restore(n)["state"]["params"]["embed"]["embedding"]
    for n in (2, 3, 4, 5)
  ]
  np.testing.assert_array_equal(weights[0], weights[1])
  np.testing.assert_array_equal(weights[1], weights[2])
  assert (weights[2] != weights[3]).any()


def test_too_many_bad_steps_end_the_run_with_good_checkpoints(
  tiny, tmp_path, monkeypatch
):
  config = with_train(tiny, log_every=1, max_bad_steps=2)
  with monkeypatch.context() as patch:
    spoil(patch, lambda n: n >= 3, without_numbers)
    with pytest.raises(
      faults.Diverged, match="not finite in 2 steps .* step 4"
    ):
      loop.run(config, tmp_path)
  assert not (tmp_path / "result.json").exists()
  for leaf in jax.tree.leaves(final_state(config, tmp_path).params):
    assert np.isfinite(leaf).all()
  # The cause removed, the same command goes on.
  assert loop.run(config, tmp_path)["steps"] == 6


def jumped(train_step, state, batch):
  state, scalars = train_step(state, batch)
  return state, scalars._replace(loss=scalars.loss * 100)


def test_spike_goes_back_and_past_the_data(tiny, tmp_path, monkeypatch):
  config = with_train(
    tiny,
    steps=12,
    log_every=1,
    checkpoint_every=4,
    eval_every=0,
    rollback_factor=3.0,
  )
  read, times = [], itertools.count()
  real = loop.sharding.put_batch

  def put_batch(batch, *args):
    if len(batch["tokens"]) == 4 and batch["weights"].min() != 0:
      read.append(batch["tokens"].tobytes())
    return real(batch, *args)

  monkeypatch.setattr(loop.sharding, "put_batch", put_batch)
  spoil(monkeypatch, lambda n: n == 6 and next(times) == 0, jumped)
  loop.run(config, tmp_path)
  records = metrics.read(tmp_path)
  # The jump of step 6 is seen one step later; back to checkpoint 4.
  assert [
    (r["step"], r["offset"]) for r in records if r["kind"] == "rollback"
  ] == [(4, 3)]
  assert int(final_state(config, tmp_path).offset) == 3
  steps = [r["step"] for r in records if r["kind"] == "train"]
  assert steps == [*range(1, 7), *range(5, 13)]
  assert len(set(read[:15])) == 15  # no training batch twice


def test_too_many_spikes_end_the_run(tiny, tmp_path, monkeypatch):
  config = with_train(
    tiny, steps=12, log_every=1, rollback_factor=3.0, max_rollbacks=2
  )
  spoil(monkeypatch, lambda n: n == 7, jumped)
  with pytest.raises(faults.Diverged, match="jumped to .* the 3th time"):
    loop.run(config, tmp_path)


# ---------------------------------------------------------------- data


def test_batches_pass_and_end():
  assert list(faults.with_timeout(iter(range(5)), 10.0)) == list(range(5))


def test_batches_are_made_ahead():
  made = []

  def make():
    for n in range(9):
      made.append(n)
      yield n

  batches = faults.with_timeout(make(), 10.0, ahead=3)
  assert next(batches) == 0
  deadline = time.monotonic() + 10
  while len(made) < 5 and time.monotonic() < deadline:
    time.sleep(0.01)
  assert len(made) == 5  # one is used, three wait, one is at hand
  batches.close()


def test_hanging_data_is_an_error_within_its_time():
  def hang():
    yield 1
    time.sleep(60)

  batches = faults.with_timeout(hang(), 0.3)
  assert next(batches) == 1
  start = time.monotonic()
  with pytest.raises(faults.NoData, match="no batch for 0.3 s"):
    next(batches)
  assert time.monotonic() - start < 10


def test_dying_data_is_an_error():
  def die():
    yield 1
    raise OSError("storage went away")

  batches = faults.with_timeout(die(), 10.0)
  assert next(batches) == 1
  with pytest.raises(faults.NoData, match="reading .* storage went away"):
    next(batches)


def test_hung_step_dumps_the_stacks(capfd):
  watchdog = faults.Watchdog(0.2)
  with watchdog.watch():
    watchdog.step()
    time.sleep(0.6)
  assert "test_hung_step_dumps_the_stacks" in capfd.readouterr().err
  time.sleep(0.5)
  assert not capfd.readouterr().err


# --------------------------------------------------------- checkpoints


def truncate(checkpoint):
  """Cuts every larger file of a checkpoint in half."""
  for path in checkpoint.rglob("*"):
    if path.is_file() and path.stat().st_size > 200:
      os.truncate(path, path.stat().st_size // 2)


@pytest.fixture
def killed(tiny, tmp_path, monkeypatch):
  """A run that was killed with checkpoints 2 and 4."""
  with monkeypatch.context() as patch:
    kill_at(patch, 5)
    with pytest.raises(Killed):
      loop.run(tiny, tmp_path / "run")
  return tmp_path / "run"


def test_truncated_newest_checkpoint_is_set_aside(tiny, killed, capsys):
  whole = killed.parent / "whole"
  result = loop.run(tiny, whole)
  truncate(killed / "checkpoints" / "4")
  capsys.readouterr()
  again = loop.run(tiny, killed)
  said = capsys.readouterr().err
  assert (
    "checkpoint 4 cannot be read and was moved to broken_checkpoints" in said
  )
  assert (killed / "broken_checkpoints" / "4").is_dir()
  assert without_clock(again) == without_clock(result)
  jax.tree.map(
    np.testing.assert_array_equal,
    final_state(tiny, whole),
    final_state(tiny, killed),
  )


def test_no_readable_checkpoint_is_one_clear_line(tiny, killed):
  for number in ("2", "4"):
    truncate(killed / "checkpoints" / number)
  with pytest.raises(ConfigError, match="no checkpoint in .* can be read"):
    loop.run(tiny, killed)
  assert (killed / "checkpoints" / "2").is_dir()


def test_best_checkpoint_is_kept(tiny, tmp_path):
  config = with_train(
    tiny, steps=8, checkpoint_every=1, eval_every=1, keep_best=1
  )
  config = dataclasses.replace(
    config, opt=dataclasses.replace(config.opt, peak_lr=3.0)
  )
  loop.run(config, tmp_path)
  losses = {
    r["step"]: r["loss"]
    for r in metrics.read(tmp_path)
    if r["kind"] == "eval" and r["split"] == "valid"
  }
  best = min(losses, key=losses.get)
  kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
  assert kept == {best, 7, 8}


def test_second_job_on_a_workdir_is_refused(tiny, tmp_path):
  workdir.claim(tmp_path, tiny, {}, write=True)
  with (
    workdir.locked(tmp_path),
    pytest.raises(ConfigError, match=f"another run trains .*{os.getpid()}"),
  ):
    loop.run(tiny, tmp_path)
  assert loop.run(tiny, tmp_path)["steps"] == 6


# ------------------------------------------------- real processes, real ends

RUN = """
import json, pathlib, sys
from hope_jax import config
from hope_jax.training import command, loop
from absl import flags
def main():
  values = json.loads(pathlib.Path(sys.argv[1]).read_text())
  loop.run(config.from_config_dict(values), pathlib.Path(sys.argv[2]))
sys.argv, sys_argv = sys.argv[:1], sys.argv
def guarded():
  sys.argv = sys_argv
  main()
command.run(guarded)
"""


def child(config, folder, prefix=()):
  path = folder.with_suffix(".json")
  path.write_text(json.dumps(config_lib.to_dict(config)))
  return subprocess.Popen(
    [*prefix, sys.executable, "-c", RUN, str(path), str(folder)],
    cwd=REPOSITORY,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for_step(folder, number, process):
  while process.poll() is None:
    records = metrics.read(folder)
    if records and records[-1]["step"] >= number:
      return
    time.sleep(0.002)


def kill_and_resume(config, folder, moments, rng):
  """Kills the run with -9 at `moments` random moments, then lets it end."""
  for _ in range(moments):
    process = child(config, folder)
    done = metrics.read(folder)
    here = done[-1]["step"] if done else 0
    target = rng.randint(here, config.train.steps - 1)
    wait_for_step(folder, target, process)
    time.sleep(rng.random() * 0.2)
    process.kill()
    process.communicate()
  process = child(config, folder)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err


@pytest.mark.parametrize(
  "moments", [3, pytest.param(20, marks=pytest.mark.slow)]
)
def test_killed_runs_continue_bit_for_bit(tiny, tmp_path, moments):
  config = with_train(
    tiny, steps=120, log_every=1, checkpoint_every=7, eval_every=20
  )
  result = loop.run(config, tmp_path / "whole")
  kill_and_resume(config, tmp_path / "killed", moments, random.Random(moments))
  again = workdir.read_result(tmp_path / "killed")
  assert without_clock(again) == without_clock(json.loads(json.dumps(result)))
  assert [without_clock(r) for r in metrics.read(tmp_path / "killed")] == [
    without_clock(r) for r in metrics.read(tmp_path / "whole")
  ]
  jax.tree.map(
    np.testing.assert_array_equal,
    final_state(config, tmp_path / "whole"),
    final_state(config, tmp_path / "killed"),
  )


def test_sigterm_saves_and_says_resumable(tiny, tmp_path):
  config = with_train(tiny, steps=10_000, log_every=1, checkpoint_every=0)
  process = child(config, tmp_path / "run")
  wait_for_step(tmp_path / "run", 3, process)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 75, err
  assert err.splitlines()[-1].startswith("error: saved step ")
  assert "run the same command again to resume" in err
  assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_full_disk_is_one_clear_line(tiny, killed):
  """A limit on the size of files stands for a disk that fills up."""
  before = final_state(tiny, killed)
  copy = killed.parent / "copy"
  shutil.copytree(killed, copy)

  limit = ["bash", "-c", 'ulimit -f 8 && exec "$@"', "limited"]  # 8 KB
  process = child(tiny, copy, prefix=limit)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 1
  (line,) = [line for line in err.splitlines() if line.startswith("error")]
  assert "cannot save a checkpoint: the disk is full" in line
  jax.tree.map(np.testing.assert_array_equal, before, final_state(tiny, copy))
