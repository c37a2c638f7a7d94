"""Files of runs and data sets, on a disk or in a bucket (`gs://`).

An `epath.Path` reads and writes both alike.  This module handles the
differences: a bucket's objects appear whole but cannot grow, and libraries that
want a local file need a copy.  `gs://` needs the extra `gcs`.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from hope_jax.config import ConfigError

_COPY_BYTES = 1 << 24  # bytes copied at a time


def reason(error: Exception) -> str:
  """The message of an error, in one line."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reach(name: str) -> epath.Path:
  """The path `name`; `ConfigError` if its bucket cannot be reached."""
  path = epath.Path(name)
  if is_remote(name):
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # tracebacks
    try:
      path.exists()
    except Exception as error:  # no library, no network, no credentials ...
      raise ConfigError(
        f"cannot reach {name} ({reason(error)}): install the extra gcs, log in"
        " (gcloud auth application-default login), check the bucket's name"
      ) from error
  return path


def check_output(name: str, flag: str) -> epath.Path:
  """The file `name` of `--flag`, which is to be written at the end;
  `ConfigError` now if that is not possible."""
  path = reach(name)
  if path.is_dir():
    raise ConfigError(f"--{flag}={name} is a folder: name a file")
  _probe(path, f"--{flag}={name}")
  return path


def check_folder(name: str, flag: str) -> epath.Path:
  """As `check_output`, for a folder that exists or will be made."""
  path = reach(name)
  is_there = path.is_dir()
  if path.exists() and not is_there:
    raise ConfigError(f"--{flag}={name} is a file: name a folder")
  _probe(path / "probe" if is_there else path, f"--{flag}={name}")
  return path


def check_empty(folder: epath.Path) -> None:
  """`ConfigError` unless `folder` is empty or does not exist."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ConfigError(f"{folder} exists and is not empty: choose another")


def _probe(path: epath.Path, named: str) -> None:
  """`ConfigError` if no file can be made beside `path`."""
  try:
    if is_remote(path):
      probe = path.parent / f"{path.name}.tmp{os.getpid()}"
      probe.write_text("probe")
      probe.unlink()
    else:
      with writing(path) as beside:
        beside.touch()
        beside.unlink()
  except Exception as error:  # a bucket may raise anything
    raise ConfigError(
      f"cannot write {named} ({reason(error)}): choose another place"
    ) from error


def is_remote(path: Any) -> bool:
  """Whether `path` is in a bucket."""
  return "://" in str(path)


def is_read_once(path: epath.Path) -> bool:
  """Whether `path` is a pipe or a terminal, which can be read only once."""
  if is_remote(path):
    return False
  here = pathlib.Path(path)
  return here.is_fifo() or here.is_char_device()


def absolute(path: epath.Path) -> epath.Path:
  """`path` from the root; one in a bucket is returned as it is."""
  return path if is_remote(path) else epath.Path(path).resolve()


def cache() -> pathlib.Path:
  """The folder of files that can be made again: $HOPE_JAX_CACHE."""
  name = os.environ.get("HOPE_JAX_CACHE", "~/.cache/hope_jax")
  return pathlib.Path(name).expanduser()


def local(path: epath.Path) -> pathlib.Path:
  """`path`, or for a remote one its copy in the cache ($HOPE_JAX_CACHE).

  The copy is renewed when the object's size or date has changed.
  """
  if not is_remote(path):
    return pathlib.Path(path)
  key = hashlib.sha256(str(path).encode()).hexdigest()[:16]
  copy = cache() / key / path.name
  there = path.stat()
  here = epath.Path(copy).stat() if copy.exists() else None
  if here is None or (here.length, here.mtime) != (there.length, there.mtime):
    with writing(epath.Path(copy)) as beside:
      _copy(path, epath.Path(beside))
      os.utime(beside, (there.mtime, there.mtime))
  return copy


@contextlib.contextmanager
def writing(
  path: epath.Path, scratch: epath.Path | None = None
) -> Iterator[pathlib.Path]:
  """A temporary local file to write, which becomes `path` at the end.

  `path` appears whole, or not at all after an error or if the caller removes
  the file.  `scratch`: the folder of the temporary file, on the same file
  system; default: beside `path`.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  remote = is_remote(path)
  folder = tempfile.mkdtemp() if remote else scratch or path.parent
  beside = pathlib.Path(folder) / f"{path.name}.tmp{os.getpid()}"
  try:
    yield beside
    if remote and beside.exists():
      _copy(epath.Path(beside), path)
    elif beside.exists():
      with beside.open("rb") as file:
        os.fsync(file.fileno())  # else a power loss may leave it empty
      beside.replace(path)
  finally:
    beside.unlink(missing_ok=True)
    if remote:
      os.rmdir(folder)


def _copy(source: epath.Path, target: epath.Path) -> None:
  with source.open("rb") as reader, target.open("wb") as writer:
    shutil.copyfileobj(reader, writer, _COPY_BYTES)


def write_text(path: epath.Path, text: str) -> None:
  """Writes a small file; if it is killed midway, the old file remains."""
  if is_remote(path):
    path.write_text(text)
    return
  with writing(path) as beside:
    beside.write_text(text, encoding="utf-8")
