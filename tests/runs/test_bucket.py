"""Runs in a bucket."""

import json
import os

import numpy as np
import pytest
from etils import epath

from hope_jax.config import ConfigError
from hope_jax.export import export_run
from hope_jax.inference import texts as texts_lib
from hope_jax.inference.sampling import Sampling
from hope_jax.interchange import safetensors as safetensors_lib
from hope_jax.runs import errors, files, workdir
from hope_jax.training import loop, metrics
from tests.training.test_loop import Killed, kill_at, without_clock


def run_patiently(config, folder):
  """The emulator's answer is malformed for TensorStore once in some runs
  (StorageGeneration); the error says to run the same command again."""
  for _ in range(2):
    try:
      return loop.run(config, folder)
    except errors.SaveFailed as error:
      assert "Malformed StorageGeneration" in str(error)
  return loop.run(config, folder)


def test_run_in_a_bucket_equals_one_on_the_disk(
  tiny, bucket, tmp_path, monkeypatch
):
  result = loop.run(tiny, epath.Path(tmp_path / "run"))
  run = bucket / "run"
  with monkeypatch.context() as patch:
    kill_at(patch, 5)
    patch.setattr(metrics.Writer, "close", lambda writer: None)
    with pytest.raises(Killed):
      run_patiently(tiny, run)
  assert {path.name for path in run.iterdir()} >= {"config.json", "checkpoints"}
  assert metrics.read(run)[-1]["step"] == 4
  again = run_patiently(tiny, run)
  assert without_clock(again) == without_clock(result)
  assert json.loads((run / "result.json").read_text())["steps"] == 6
  assert [without_clock(r) for r in metrics.read(run)] == [
    without_clock(r) for r in metrics.read(epath.Path(tmp_path / "run"))
  ]
  assert not (run / "lock").exists()

  export_run(run, bucket / "exported")
  export_run(epath.Path(tmp_path / "run"), epath.Path(tmp_path / "exported"))
  ours, theirs = (
    safetensors_lib.load(folder / "exported")
    for folder in (bucket, epath.Path(tmp_path))
  )
  for name in ours["embed"]:
    np.testing.assert_array_equal(ours["embed"][name], theirs["embed"][name])
  sampling = Sampling(temperature=0.0)
  texts = [
    texts_lib.generate(folder, ["ROMEO"], count=4, sampling=sampling)
    for folder in (run, epath.Path(tmp_path / "run"))
  ]
  assert texts[0] == texts[1]


def test_lock_in_a_bucket(bucket, monkeypatch, capsys):
  monkeypatch.setattr(workdir, "LEASE_SECONDS", 0.2)
  with (
    workdir.locked(bucket),
    pytest.raises(ConfigError, match="another run trains in gs://.*process"),
    workdir.locked(bucket),
  ):
    pass
  assert "sign of life" in capsys.readouterr().err
  assert not (bucket / "lock").exists()
  (bucket / "lock").write_text("process 1 on a machine that is gone")
  with workdir.locked(bucket):  # it is not renewed
    assert "machine that is gone" not in (bucket / "lock").read_text()


def test_copy_of_an_object_that_changed_is_taken_again(bucket, monkeypatch):
  """The new one has as many bytes: another export of the same model."""
  path = bucket / "x.bin"
  path.write_bytes(b"old")
  copy = files.local(path)
  date = int(copy.stat().st_mtime)
  assert copy.read_bytes() == b"old" and date == path.stat().mtime > 0
  with monkeypatch.context() as patch:
    patch.setattr(files, "_copy", fail)
    assert files.local(path) == copy  # not a second time
  os.utime(copy, (date - 9, date - 9))  # as if it were of another day
  path.write_bytes(b"new")
  assert files.local(path).read_bytes() == b"new"


def test_bucket_that_cannot_be_reached_is_one_clear_line(monkeypatch):
  monkeypatch.setattr(epath.gpath.PosixGPath, "exists", fail)
  with pytest.raises(ConfigError, match="cannot reach gs://nowhere/x .no net"):
    files.reach("gs://nowhere/x")


def fail(*paths):
  raise RuntimeError("no network\nat all")
