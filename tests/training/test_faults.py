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
from hope_jax.runs import checkpoints, errors, workdir
from hope_jax.training import faults, loop, metrics, step
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
  manager = checkpoints.open_manager(tmp_path, config.train)
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
      errors.Diverged, match="not finite in 2 steps .* step 4"
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
  with pytest.raises(errors.Diverged, match="jumped to .* the 3th time"):
    loop.run(config, tmp_path)


def guard(losses=(), records=None, **fields):
  """A guard that has seen `losses`, of an earlier session with `records`."""
  config = config_lib.TrainConfig(**{"rollback_factor": 3.0, **fields})
  found = faults.Guard(config, records or [])
  for number, loss in enumerate(losses):
    assert not found.is_spike(seen(number, loss))
  return found


def seen(number, loss, bad_in_a_row=0):
  return number, {"loss": loss, "bad_in_a_row": bad_in_a_row}


def test_first_losses_are_no_spikes():
  """Four losses do not say what is usual, five do."""
  assert not guard([1.0] * 4).is_spike(seen(5, 100.0))
  assert guard([1.0] * 5).is_spike(seen(6, 100.0))
  assert not guard([1.0] * 5).is_spike(seen(6, 3.0))
  assert guard([1.0] * 5).is_spike(seen(6, 3.01))
  assert not guard([1.0] * 9, rollback_factor=0.0).is_spike(seen(9, 1e9))
  # What is not finite is skipped by the step, and is nothing usual.
  nan = guard([1.0] * 4 + [math.nan] * 3)
  assert not nan.is_spike(seen(7, 100.0))


def test_spikes_are_measured_against_the_last_fifty_losses():
  """The median of 50: 25 new losses move it half way, 26 all the way."""
  old, new = [6.0] * 50, [1.5]
  assert not guard([*old, *new * 24]).is_spike(seen(99, 17.0))
  assert not guard([*old, *new * 25]).is_spike(seen(99, 11.0))  # 3 * 3.75
  assert guard([*old, *new * 25]).is_spike(seen(99, 11.5))
  assert guard([*old, *new * 26]).is_spike(seen(99, 4.6))
  assert not guard([*old, *new * 26]).is_spike(seen(99, 4.5))


def test_either_of_two_losses_may_be_the_spike():
  assert guard([1.0] * 5).is_spike(seen(6, 9.0), seen(7, 1.0))
  assert guard([1.0] * 5).is_spike(seen(6, 1.0), seen(7, 9.0))
  assert not guard([1.0] * 5).is_spike(None, seen(7, 1.0), None)


def test_resumed_guard_is_the_uninterrupted_one():
  """A jump that sent the run back is not among its usual losses."""
  losses = [1.0, 1.1, 1.2, 1.3, 1.4, None, 90.0, 1.3, 95.0, 1.2]
  records = [
    {"kind": "train", "step": number, "loss": loss}
    for number, loss in enumerate(losses)
  ]
  records.insert(7, {"kind": "rollback", "step": 4, "offset": 3})
  records.insert(0, {"kind": "eval", "step": 0, "loss": 77.0})
  resumed = guard(records=records, max_rollbacks=2)
  usual = 3.0 * 1.2  # 1.0 1.1 1.2 1.2 1.3 1.3 1.4: the median is 1.2
  assert not resumed.is_spike(seen(11, usual))
  assert resumed.is_spike(seen(12, usual + 0.2))  # the second rollback
  with pytest.raises(errors.Diverged, match="step 13, the 3th time"):
    resumed.is_spike(seen(13, 90.0))


def test_bad_steps_end_the_run_at_the_limit_only():
  found = guard(max_bad_steps=3)
  assert not found.is_spike(seen(1, math.nan, bad_in_a_row=2))
  with pytest.raises(errors.Diverged, match="in 3 steps up to step 2"):
    found.is_spike(seen(2, math.nan, bad_in_a_row=3))


@pytest.mark.parametrize(
  ("valid", "test", "bad", "bad_in_a_row", "message"),
  [
    (1.0, 2.0, 0, 0, None),
    (1.0, 2.0, 5, 1, None),  # like any other step that is skipped
    (math.nan, 2.0, 0, 0, "the valid loss after the last step"),
    (1.0, math.inf, 0, 0, "the test loss after the last step"),
    (1.0, None, 0, 0, "the test loss"),  # as metrics.jsonl has it
    (1.0, 2.0, 2, 2, "not finite in the last 2 of 6 steps"),
    (1.0, 2.0, 6, 6, "not finite in the last 6 of 6 steps"),
  ],
)
def test_run_that_ends_not_finite_has_no_result(
  valid, test, bad, bad_in_a_row, message
):
  config = config_lib.TrainConfig(steps=6)
  losses = {"valid": valid, "test": test}
  counts = {"bad": bad, "bad_in_a_row": bad_in_a_row}
  if message is None:
    faults.check_end(config, losses=losses, **counts)
    return
  with pytest.raises(errors.Diverged, match=message):
    faults.check_end(config, losses=losses, **counts)
  only = config_lib.TrainConfig(steps=1)
  with pytest.raises(errors.Diverged, match="in the last 1 of 1 steps"):
    faults.check_end(only, losses={}, bad=1, bad_in_a_row=1)


def test_evaluation_without_a_number_is_no_result_and_stays_none(
  tiny, tmp_path, monkeypatch
):
  """In the middle of a run it is recorded only; the same command says it
  again, trains nothing and leaves the folder as it is."""
  monkeypatch.setattr(
    loop.evaluation, "evaluate", lambda *_, **__: NO_SCORES.copy()
  )
  for _ in range(2):
    with pytest.raises(errors.Diverged, match="valid loss .* is not finite"):
      loop.run(tiny, tmp_path)
    assert not (tmp_path / "result.json").exists()
  assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
  evals = [r for r in metrics.read(tmp_path) if r["kind"] == "eval"]
  assert [(r["step"], r["loss"]) for r in evals] == [(3, None)] + [
    (6, None)
  ] * 2


NO_SCORES = {"loss": math.nan, "accuracy": 0.0, "targets": 9}


def test_learning_rate_without_bounds_ends_as_diverged(tiny, tmp_path):
  """Fewer bad steps than max_bad_steps, but all up to the last."""
  opt = dataclasses.replace(tiny.opt, peak_lr=3e38, clip_norm=0.0, eps=1e-30)
  config = dataclasses.replace(tiny, opt=opt)
  for _ in range(2):
    with pytest.raises(errors.Diverged, match="finite in the last 5 of 6"):
      loop.run(config, tmp_path)
  assert not (tmp_path / "result.json").exists()


def overflowed(train_step, state, batch):
  state, scalars = train_step(state, batch)
  params = jax.tree.map(lambda x: x * math.inf, state.params)
  return dataclasses.replace(state, params=params), scalars


def test_parameters_that_overflow_are_never_saved(tiny, tmp_path, monkeypatch):
  """The last update's own loss and gradient are finite."""
  with monkeypatch.context() as patch:
    spoil(patch, lambda n: n == 6, overflowed)
    with pytest.raises(errors.Diverged, match="is not finite after step 6"):
      loop.run(tiny, tmp_path)
  assert not (tmp_path / "result.json").exists()
  assert not (tmp_path / "checkpoints" / "6").exists()
  assert int(final_state(tiny, tmp_path).step) == 4
  # The cause removed, the same command goes on.
  assert loop.run(tiny, tmp_path)["steps"] == 6


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
  with pytest.raises(errors.NoData, match="no batch for 0.3 s"):
    next(batches)
  assert time.monotonic() - start < 10


def test_dying_data_is_an_error():
  def die():
    yield 1
    raise OSError("storage went away")

  batches = faults.with_timeout(die(), 10.0)
  assert next(batches) == 1
  with pytest.raises(errors.NoData, match="reading .* storage went away"):
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
  workdir.claim(tmp_path, tiny, {})
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
from hope_jax import cli
from hope_jax.training import loop
from absl import flags
def main():
  values = json.loads(pathlib.Path(sys.argv[1]).read_text())
  loop.run(config.from_config_dict(values), pathlib.Path(sys.argv[2]))
sys.argv, sys_argv = sys.argv[:1], sys.argv
def guarded():
  sys.argv = sys_argv
  main()
cli.run(guarded)
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
