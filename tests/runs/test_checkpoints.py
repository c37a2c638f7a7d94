"""Checkpoints: what is saved comes back, or is set aside."""

import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from hope_jax.config import ConfigError, TrainConfig
from hope_jax.runs import checkpoints, digest, errors
from hope_jax.training.step import TrainState

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CONFIG = TrainConfig(keep_checkpoints=9)
NEWEST, BEFORE = 4, 2


def make_state(step, seed=0):
  """Arrays of every kind that a state has."""
  draw = np.random.default_rng(100 * seed + step).normal
  params = {
    "embed": {"embedding": jnp.asarray(draw(size=(64, 24)), jnp.float32)},
    "half": jnp.asarray(draw(size=(3, 5)), jnp.bfloat16),
  }
  whole = jnp.asarray(step, jnp.int32)
  return TrainState(
    step=whole,
    params=params,
    opt_state={"mu": jax.tree.map(lambda x: x / 2, params), "count": whole},
    fast={"is_open": jnp.asarray(draw(size=(4,)) > 0)},
    bad=whole,
    bad_in_a_row=whole,
    offset=whole,
  )


def abstract_of(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


ABSTRACT = abstract_of(make_state(0))


def write(folder, losses, state=make_state):
  """Checkpoints of the steps of `losses` with these validation losses."""
  manager = checkpoints.open_manager(epath.Path(folder), CONFIG)
  for step, loss in losses.items():
    checkpoints.save(manager, step, state(step), loss)
  checkpoints.close(manager)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  folder = tmp_path_factory.mktemp("original")
  write(folder, {BEFORE: 2.5, NEWEST: 1.5})
  return folder


@pytest.fixture
def run(original, tmp_path):
  shutil.copytree(original, tmp_path / "run")
  return tmp_path / "run"


def restore(folder):
  manager = checkpoints.open_manager(epath.Path(folder), CONFIG)
  try:
    return checkpoints.restore(manager, ABSTRACT)
  finally:
    checkpoints.close(manager)


def check_equal(state, step):
  wanted = make_state(step)
  assert jax.tree.structure(state) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, state, wanted)


def files_of(step_folder):
  return sorted(p for p in step_folder.rglob("*") if p.is_file())


def damage(path, rng):
  """Flips a bit, or cuts the file, at a random place; says what it did."""
  content = bytearray(path.read_bytes())
  place = rng.randrange(len(content))
  if rng.random() < 0.25:
    path.write_bytes(content[:place])
    return f"{path} cut at {place} of {len(content)}"
  bit = rng.randrange(8)
  content[place] ^= 1 << bit
  path.write_bytes(content)
  return f"{path} byte {place} of {len(content)}, bit {bit}"


@pytest.mark.parametrize(
  "times", [25, pytest.param(400, marks=pytest.mark.slow)]
)
def test_any_damaged_file_is_harmless_or_sets_its_step_aside(
  original, tmp_path, capsys, times
):
  rng, outcomes = random.Random(times), []
  for number in range(times):
    run = tmp_path / str(number)
    shutil.copytree(original, run)
    newest = run / "checkpoints" / str(NEWEST)
    done = damage(rng.choice(files_of(newest)), rng)
    capsys.readouterr()
    state = restore(run)
    said = capsys.readouterr().err
    step = int(state.step)
    outcomes.append(step)
    check_equal(state, step)
    if step == NEWEST:
      assert not said and newest.exists(), done
    else:
      assert step == BEFORE and len(said.splitlines()) == 1, done
      assert "checkpoint 4 cannot be read and was moved" in said, done
      assert not newest.exists()
    shutil.rmtree(run)
  assert set(outcomes) == {BEFORE, NEWEST}


def test_files_of_others_do_no_harm(run):
  """Beside the steps and in them."""
  checkpoint = run / "checkpoints"
  for place in (checkpoint, checkpoint / str(NEWEST)):
    (place / "junk").mkdir()
    (place / "note.txt").write_text("not a checkpoint")
  (checkpoint / "007").mkdir()
  check_equal(restore(run), NEWEST)


def remove(path):
  shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
  ("name", "content", "reason"),
  [
    ("metrics/metrics", b"", "is not JSON"),
    ("metrics/metrics", b"{}", "a file lacks 'valid_loss'"),
    ("metrics/metrics", b'{"valid_loss": NaN}', "is not JSON: it has NaN"),
    ("metrics/metrics", b'{"valid_loss": 1e999}', "its valid_loss is inf"),
    ("metrics/metrics", b"\xff", "is not JSON"),
    ("metrics", None, "it has no metrics"),
    ("digest/metadata", b"", "is not JSON"),
    ("digest/metadata", b"{}", "is not as it was saved"),
    ("digest", None, "it has no digest"),
    ("_CHECKPOINT_METADATA", b"", "is not JSON"),
    ("_CHECKPOINT_METADATA", b"{}", "a file lacks 'item_handlers'"),
    ("_CHECKPOINT_METADATA", None, "cannot read .*_CHECKPOINT_METADATA"),
    ("state/_METADATA", b"", "Expecting value"),
    ("state/manifest.ocdbt", b"", "manifest"),
    ("state/manifest.ocdbt", None, "."),
    ("state", None, "it has no state"),
    ("", None, "cannot read"),
  ],
)
def test_damage_is_named_in_one_line(run, capsys, name, content, reason):
  path = run / "checkpoints" / str(NEWEST) / name
  remove(path)
  if content is not None:
    path.write_bytes(content)
  if not name:
    path.mkdir()
  check_equal(restore(run), BEFORE)
  (line,) = capsys.readouterr().err.splitlines()
  assert re.search(
    rf"checkpoint 4 cannot be read and was moved to broken_checkpoints"
    rf" \(.*{reason}.*\); the run goes on from checkpoint 2",
    line,
  )
  assert len(line) < 500


def test_damaged_older_checkpoint_is_set_aside_too(run, capsys):
  """Its metrics are read whenever one is to be removed."""
  (run / "checkpoints/2/metrics/metrics").write_text("")
  check_equal(restore(run), NEWEST)
  assert "checkpoint 2 cannot be read" in capsys.readouterr().err
  assert (run / "broken_checkpoints" / "2").is_dir()


def test_same_step_is_set_aside_twice(run):
  for name in ("4", "4-2"):
    (run / "checkpoints/4/metrics/metrics").write_text("")
    check_equal(restore(run), BEFORE)
    assert (run / "broken_checkpoints" / name).is_dir()
    write(run, {NEWEST: 1.5})
  check_equal(restore(run), NEWEST)


def test_nothing_is_moved_if_no_checkpoint_can_be_read(run):
  for step in (BEFORE, NEWEST):
    (run / "checkpoints" / str(step) / "state" / "manifest.ocdbt").unlink()
  with pytest.raises(ConfigError, match="no checkpoint in .* can be read"):
    restore(run)
  assert len(list((run / "checkpoints").iterdir())) == 2
  assert not (run / "broken_checkpoints").exists()


def test_checkpoint_of_an_older_version_has_no_digest_and_is_taken(run):
  folder = run / "checkpoints" / str(NEWEST)
  shutil.rmtree(folder / "digest")
  path = folder / "_CHECKPOINT_METADATA"
  values = json.loads(path.read_text())
  del values["item_handlers"]["digest"]
  path.write_text(json.dumps(values))
  check_equal(restore(run), NEWEST)
  step, params = checkpoints.restore_params(epath.Path(run), ABSTRACT.params)
  assert step == NEWEST
  jax.tree.map(np.testing.assert_array_equal, params, make_state(4).params)


def exchanged(params):
  """Two rows change places, which no sum of the numbers sees."""
  table = params["embed"]["embedding"]
  return {**params, "embed": {"embedding": table[::-1]}}


@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_arrays_of_another_state_are_seen(run, tmp_path, capsys, part):
  """As if a file system had handed out another file: whole, but not it."""

  def other(step):
    state = make_state(step)
    values = getattr(state, part)
    mu = values if part == "params" else values["mu"]
    changed = exchanged(mu) if part == "params" else {"mu": exchanged(mu)}
    return dataclasses.replace(state, **{part: values | changed})

  write(tmp_path / "other", {NEWEST: 1.5}, state=other)
  folder = run / "checkpoints" / str(NEWEST)
  shutil.rmtree(folder / "state")
  shutil.copytree(tmp_path / "other/checkpoints/4/state", folder / "state")
  if part == "params":
    before = sorted(str(path) for path in run.rglob("*"))
    with pytest.raises(ConfigError, match="4 .*embedding is not as it was sav"):
      checkpoints.restore_params(epath.Path(run), ABSTRACT.params)
    assert sorted(str(path) for path in run.rglob("*")) == before
  check_equal(restore(run), BEFORE)
  assert "embed/embedding is not as it was saved" in capsys.readouterr().err


def test_readers_say_what_to_do_and_write_nothing(run):
  os.truncate(run / "checkpoints/4/state/manifest.ocdbt", 20)
  (run / "checkpoints/2/metrics/metrics").write_text("")
  before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
  for finished, first in ((False, ""), (True, "remove its result.json, then ")):
    if finished:
      (run / "result.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
      checkpoints.restore_params(epath.Path(run), ABSTRACT.params)
    assert f"): {first}run the training command again" in str(caught.value)
    assert "checkpoint 4" in str(caught.value) and "\n" not in str(caught.value)
  (run / "result.json").unlink()
  os.utime(run, ns=(0, before.pop(run, 0)))
  assert {p: p.stat().st_mtime_ns for p in before} == before


def test_reader_of_the_newest_does_not_mind_the_others(run):
  (run / "checkpoints/2/metrics/metrics").write_text("")
  step, params = checkpoints.restore_params(epath.Path(run), ABSTRACT.params)
  assert step == NEWEST
  jax.tree.map(np.testing.assert_array_equal, params, make_state(4).params)


# ------------------------------------------------------------ not finite


def spoiled(step, number=np.nan, part="params"):
  state = make_state(step)
  values = getattr(state, part)
  values = values if part == "params" else values["mu"]
  table = values["embed"]["embedding"].at[3, 4].set(number)
  values = {**values, "embed": {"embedding": table}}
  values = values if part == "params" else {"mu": values}
  return dataclasses.replace(state, **{part: getattr(state, part) | values})


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_state_that_is_not_finite_is_not_saved(run, number, part):
  manager = checkpoints.open_manager(epath.Path(run), CONFIG)
  with pytest.raises(errors.Diverged, match="embedding is not finite after st"):
    checkpoints.save(manager, 6, spoiled(6, number, part))
  checkpoints.close(manager)
  assert not (run / "checkpoints" / "6").exists()


def test_stored_state_that_is_not_finite_is_set_aside(run, capsys, monkeypatch):
  """An older version saved it."""
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints, "_not_finite", lambda leaves: "")
    write(run, {6: 1.0}, state=spoiled)
  with pytest.raises(ConfigError, match="6 .*embed/embedding is not finite"):
    checkpoints.restore_params(epath.Path(run), ABSTRACT.params)
  check_equal(restore(run), NEWEST)
  assert "embed/embedding is not finite" in capsys.readouterr().err


def kept(folder):
  return {int(path.name) for path in (folder / "checkpoints").iterdir()}


def test_best_checkpoint_stays_the_best_over_sessions(tmp_path):
  """A loss that is no number is none, and none of the best."""
  config = TrainConfig(keep_checkpoints=1, keep_best=1)
  losses = {1: 3.0, 2: 1.0, 3: np.nan, 4: 2.0, 5: np.inf, 6: None, 7: 1.5}
  for step, loss in losses.items():  # every session saves one
    manager = checkpoints.open_manager(epath.Path(tmp_path), config)
    checkpoints.restore(manager, ABSTRACT)
    checkpoints.save(manager, step, make_state(step), loss)
    checkpoints.close(manager)
  assert kept(tmp_path) == {2, 7}


# ------------------------------------------------------ several processes

TWO = """
import sys
from etils import epath
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from hope_jax.config import ConfigError, TrainConfig
from hope_jax.runs import checkpoints
from hope_jax.training.step import TrainState

port, index, folder, steps = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
manager = checkpoints.open_manager(epath.Path(folder), TrainConfig())

def make(step):
  table = np.random.default_rng(step).normal(size=(64, 24)).astype(np.float32)
  rows = NamedSharding(mesh, PartitionSpec("fsdp"))
  table = jax.make_array_from_callback((64, 24), rows, lambda i: table[i])
  whole = jax.device_put(step, NamedSharding(mesh, PartitionSpec()))
  return TrainState(
    whole, {"embed": {"embedding": table}}, {}, None, whole, whole, whole)

abstract_of = lambda x: jax.ShapeDtypeStruct(
  x.shape, x.dtype, sharding=x.sharding)
abstract = jax.tree.map(abstract_of, make(0))
try:
  state = checkpoints.restore(manager, abstract)
  step = int(state.step) if state is not None else 0
  if step:
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(make(step))):
      for a, b in zip(x.addressable_shards, y.addressable_shards):
        np.testing.assert_array_equal(a.data, b.data)
  print("restored", step)
  for number in map(int, filter(None, steps.split(","))):
    checkpoints.save(manager, number, make(number))
except ConfigError as error:
  print("ConfigError", error)
manager.close()
"""


def two(folder, *steps):
  """Restores with two processes, then saves `steps`: what they say."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", TWO, port, index, folder, ",".join(steps)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      cwd=REPOSITORY,
      text=True,
    )
    for index in "01"
  ]
  try:
    ends = [process.communicate(timeout=300) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert not any(process.returncode for process in processes), ends
  return ends


def test_two_processes_set_aside_what_one_of_them_cannot_read(tmp_path):
  two(tmp_path, "2", "4")
  newest = tmp_path / "checkpoints" / str(NEWEST)
  sizes = {path.stat().st_size: path for path in files_of(newest)}
  second = [p for p in sizes.values() if "ocdbt.process_1" in str(p)]
  largest = max(second, key=lambda path: path.stat().st_size)
  assert largest.stat().st_size > 2000  # the half that process 1 holds
  os.truncate(largest, 1000)
  ends = two(tmp_path)
  assert all(out.endswith("\nrestored 2\n") for out, _ in ends)
  said = "".join(err for _, err in ends)
  assert said.count("checkpoint 4 cannot be read and was moved") == 1
  assert "Traceback" not in said
  assert (tmp_path / "broken_checkpoints" / "4").is_dir()


# --------------------------------------------------------------- digests


def mix(x):
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    x = (x ^ x >> shift) * factor % (1 << 32)
  return x


def oracle(x):
  """The digest's definition, word by word in whole numbers."""
  x = np.asarray(x)
  if x.dtype == bool or x.dtype.kind in "iu":
    words = [int(value) % (1 << 32) for value in x.ravel()]
  else:
    kind = {2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    words = x.ravel().view(kind).tolist()
  a = [mix(word ^ mix(place)) for place, word in enumerate(words)]
  b = [mix((s + mix(~i % (1 << 32))) % (1 << 32)) for i, s in enumerate(a)]
  return "".join(f"{sum(each) % (1 << 32):08x}" for each in (a, b))


def test_digests_are_as_defined_and_named_by_path():
  state = make_state(NEWEST)
  found = digest.leaves(state)
  assert found["params/embed/embedding"].digest == oracle(
    state.params["embed"]["embedding"]
  )
  assert [leaf.digest for leaf in found.values()] == [
    oracle(x) for x in jax.tree.leaves(state)
  ]
  assert all(leaf.is_finite for leaf in found.values())
  assert digest.leaves({}) == {}
  assert digest.leaves(jax.device_get(state)) == found  # arrays of the host
  key = {"key": jax.random.key(3), "empty": jnp.zeros((0, 2))}
  data = jax.random.key_data(key["key"])
  assert digest.leaves(key)["key"].digest == oracle(data)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_digest_sees_what_sums_do_not(dtype):
  x = jnp.asarray(np.arange(24).reshape(4, 6) % 5 - 2).astype(dtype)
  other = [x[::-1], x[:, ::-1], x.T, x[:-1], jnp.roll(x, 1)]
  other += [x.at[0, 0].set(x[0, 1]).at[0, 1].set(x[0, 0])]
  same, *found = digest.leaves([x, *other]).values()
  for each, leaf in zip(other, found, strict=True):
    is_equal = np.array_equal(x.ravel(), each.ravel())
    assert (leaf.digest == same.digest) == is_equal
  assert len({leaf.digest for leaf in found}) > 3
