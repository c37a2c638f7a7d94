"""Places for results are checked before there are any: helpers, commands."""

import importlib
import os
import types

import pytest
from absl import flags
from etils import epath

from experiments.lib import runner
from experiments.stability import run as stability
from hope_jax.config import ConfigError
from hope_jax.runs import files


@pytest.mark.parametrize("check", [files.check_output, files.check_folder])
def test_places_that_can_be_written_are_left_as_they_are(tmp_path, check):
  (tmp_path / "file").write_text("old")
  for name in ("new", "new/folder/deep"):
    assert check(str(tmp_path / name), "output") == epath.Path(tmp_path / name)
    assert not (tmp_path / name).exists()
    assert not any((tmp_path / name).parent.glob("*.tmp*"))
  if check is files.check_output:
    check(str(tmp_path / "file"), "output")
  else:
    check(str(tmp_path), "output")
  assert (tmp_path / "file").read_text() == "old"
  assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "new"]


@pytest.mark.parametrize("name", ["/proc/no/x", "/dev/null/x", "/proc/x"])
def test_places_that_cannot_be_written(name):
  for check in (files.check_output, files.check_folder):
    with pytest.raises(ConfigError, match=f"cannot write --out={name} [(]"):
      check(name, "out")


def test_folders_and_files_are_not_taken_for_each_other(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(ConfigError, match=f"--out={tmp_path} is a folder"):
    files.check_output(str(tmp_path), "out")
  with pytest.raises(ConfigError, match="--out=.*/file is a file"):
    files.check_folder(str(tmp_path / "file"), "out")


def test_places_in_a_bucket(bucket, monkeypatch):
  for check in (files.check_output, files.check_folder):
    assert str(check(str(bucket / "x.json"), "out")) == str(bucket / "x.json")
  assert not (bucket / f"x.json.tmp{os.getpid()}").exists()

  def refuse(*args, **kwargs):
    raise RuntimeError("403, no permission\nmore of it")

  monkeypatch.setattr(type(bucket), "write_text", refuse)
  with pytest.raises(ConfigError, match="cannot write --out=gs:.*[(]403, no"):
    files.check_output(str(bucket / "x.json"), "out")


PLACE = "/proc/no/x.png"
COMMANDS = {  # of absl: its flags
  "hope_jax.evaluate": {"output": PLACE},
  "hope_jax.export": {"output": PLACE},
  "hope_jax.convert": {"to_hf": PLACE, "from_hf": None, "text": None},
  "hope_jax.levels": {"json": PLACE, "figure": None},
  "hope_jax.levels ": {"json": None, "figure": PLACE},
  "scripts.stream_book": {"out": PLACE, "tokens": 1, "level": []},
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_check_their_output_first(monkeypatch, name):
  values = {"workdir": "no/run", "context_length": None} | COMMANDS[name]
  module = importlib.import_module(name.strip())
  monkeypatch.setattr(flags, "FLAGS", types.SimpleNamespace(**values))
  with pytest.raises(ConfigError, match=f"cannot write --.*={PLACE}"):
    module.main()


@pytest.mark.parametrize(
  "name", ["scripts.benchmark_generation", "scripts.backward_memory"]
)
def test_scripts_check_their_plot_first(capsys, name):
  with pytest.raises(SystemExit) as caught:
    importlib.import_module(name).main([f"--plot={PLACE}"])
  assert caught.value.code == 2
  assert f"cannot write --plot={PLACE}" in capsys.readouterr().err


def test_experiments_check_their_folders_first(capsys, tmp_path):
  def fail(*args):
    raise AssertionError("begun before all was checked")

  def run(*argv):
    return runner.main("x", {"cpu": fail}, fail, argv, prepare=fail)

  assert run(f"--out={PLACE}") == 2
  assert f"cannot write --out={PLACE}" in capsys.readouterr().err
  assert run(f"--out={tmp_path}", f"--report={PLACE}") == 2
  assert f"cannot write --report={PLACE}" in capsys.readouterr().err
  assert stability.main([f"--out={PLACE}"]) == 2
  assert f"cannot write --out={PLACE}" in capsys.readouterr().err
