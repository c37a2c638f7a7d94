"""Compiled programs are kept; half-written ones do no harm."""

import os
import subprocess
import sys
import zlib

import jax
import pytest

from hope_jax.runs import compilation

ZSTD = b"\x28\xb5\x2f\xfd"
# A frame of one content-size byte, of a raw block "abc" and a repeated "d".
FRAME = ZSTD + b"\x20\x08" + b"\x18\x00\x00abc" + b"\x2b\x00\x00d"
PACKED = zlib.compress(bytes(range(256)) * 64)


@pytest.mark.parametrize("whole", [PACKED, FRAME])
def test_only_whole_entries_are_kept(tmp_path, whole):
  for length in range(len(whole) + 1):
    (tmp_path / f"{length}-cache").write_bytes(whole[:length])
    compilation.remove_broken(tmp_path)
    left = [path.name for path in tmp_path.glob("*-cache")]
    assert left == ([f"{length}-cache"] if length == len(whole) else [])


def test_entries_of_an_unknown_kind_are_left(tmp_path):
  for name, data in (("a-cache", b"?" * 9), ("b-atime", b""), ("c", b"")):
    (tmp_path / name).write_bytes(data)
  compilation.remove_broken(tmp_path)
  assert {path.name for path in tmp_path.iterdir()} >= {
    "a-cache",
    "b-atime",
    "c",
  }


def test_entries_are_looked_at_once(tmp_path):
  """Those that were there at the last look are not read again."""
  old, new = tmp_path / "old-cache", tmp_path / "new-cache"
  compilation.remove_broken(tmp_path)
  (looked,) = tmp_path.iterdir()
  date = looked.stat().st_mtime
  for path, seconds in ((old, -60), (new, 0)):
    path.write_bytes(PACKED[:-1])
    os.utime(path, (date + seconds, date + seconds))
  compilation.remove_broken(tmp_path)
  assert old.exists() and not new.exists()


PROGRAM = """
import sys
from hope_jax import cli
def main():
  import jax
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  found = []
  jax.monitoring.register_event_listener(
    lambda name, **_: found.append(name.rsplit("/", 1)[-1]))
  print(float(jax.jit(lambda x: x * 3)(2.0)), found.count("cache_hits"))
cli.run(main)
"""


def run(folder, *flags, cache="HOPE_JAX_CACHE"):
  environment = dict(os.environ)
  environment.pop("JAX_COMPILATION_CACHE_DIR")
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, *flags],
    env=environment | {cache: str(folder)},
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  return done.stdout.strip(), done.stderr


def test_second_start_of_a_command_compiles_nothing(tmp_path):
  assert run(tmp_path) == ("6.0 0", "")
  (entry,) = (tmp_path / "compiled").glob("*-cache")
  assert run(tmp_path) == ("6.0 1", "")
  # A process that was killed while it wrote.
  whole = entry.read_bytes()
  entry.write_bytes(whole[: len(whole) // 2])
  assert run(tmp_path) == ("6.0 0", "")
  assert entry.read_bytes() == whole or run(tmp_path) == ("6.0 1", "")


def test_cache_is_off_by_a_flag_and_where_it_cannot_be(tmp_path):
  assert run(tmp_path, "--nocompilation_cache") == ("6.0 0", "")
  assert not list(tmp_path.iterdir())
  (tmp_path / "file").write_text("")
  assert run(tmp_path / "file") == ("6.0 0", "")


def test_folder_named_by_jax_is_kept(tmp_path, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
  before = jax.config.jax_compilation_cache_dir
  try:
    assert compilation.keep_programs() == tmp_path / "mine"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


def test_number_is_computed_once_for_a_key(tmp_path, monkeypatch):
  calls = []

  def compute():
    calls.append(0)
    return len(calls) / 3

  number = lambda key: compilation.remembered("flops", key, compute)
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  assert [number("a"), number("a"), number("b")] == [1 / 3, 1 / 3, 2 / 3]
  for path in tmp_path.iterdir():
    path.write_text("")  # as after a full disk
  assert number("a") == 1.0
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  assert number("a") == 4 / 3
