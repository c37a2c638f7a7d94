"""The folder of one run: config.json, data.json (hashes of what it reads),
metrics.jsonl, result.json, checkpoints.

Files appear atomically (written beside, then renamed), so that a run that is
killed leaves either the old file or the new one.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from hope_jax import config as config_lib
from hope_jax.config import Config, ConfigError, Json
from hope_jax.runs import files

CONFIG, DATA = "config.json", "data.json"
METRICS, RESULT = "metrics.jsonl", "result.json"
LOCK = "lock"
LEASE_SECONDS = 20.0  # between two renewals of a lock in a bucket
MAY_CHANGE = (
  "mesh.",
  "train.wandb",
  "train.keep_",
  "train.hang_seconds",
  "data.workers",
  "data.timeout",
)


def write_json(path: epath.Path, value: Any) -> None:
  """Writes `value` as JSON, atomically; `ValueError` for NaN and infinity,
  which JSON does not have (see `finite`)."""
  files.write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
  """`value` with None for every NaN and infinity, which JSON does not have."""
  if isinstance(value, dict):
    return {key: finite(each) for key, each in value.items()}
  if isinstance(value, list | tuple):
    return [finite(each) for each in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def read_config(workdir: epath.Path) -> Config:
  """The config of a run; `ConfigError` if `workdir` holds none."""
  if not (workdir / CONFIG).exists():
    raise ConfigError(
      f"{workdir} is not the folder of a run: it has no {CONFIG}"
    )
  return config_lib.from_config_dict(read_object(workdir / CONFIG))


def read_result(workdir: epath.Path) -> Json | None:
  """result.json of a finished run, or None; `ConfigError` if it is damaged."""
  path = workdir / RESULT
  if not path.exists():
    return None
  try:
    return read_object(path)
  except ConfigError as error:
    raise ConfigError(
      f"{error}: remove it, and run the same command again to write it anew"
    ) from error


def read_object(path: epath.Path) -> Json:
  """A file's JSON object; `ConfigError` if it holds anything else."""
  try:
    values = json.loads(path.read_text(), parse_constant=_no_constant)
  except (ValueError, RecursionError) as error:  # or not UTF-8
    raise ConfigError(f"{path} is not JSON: {error}") from error
  except OSError as error:
    raise ConfigError(f"cannot read {path}: {files.reason(error)}") from error
  if not isinstance(values, dict):
    raise ConfigError(f"{path} holds no JSON object")
  return values


def _no_constant(name: str) -> None:
  raise ValueError(f"it has {name}")


def claim(workdir: epath.Path, config: Config, data: dict[str, str]) -> None:
  """Makes `workdir` the folder of a run of `config`, or checks that it is.

  Only the fields in `MAY_CHANGE` may change between the sessions of a run; the
  data (`pipeline.fingerprint`) may not.
  """
  path = workdir / CONFIG
  if path.exists():
    old, new = (flatten(c) for c in (read_config(workdir), config))
    for name, value in new.items():
      if old[name] != value and not name.startswith(MAY_CHANGE):
        raise ConfigError(
          f"{workdir} holds a run with {name}={old[name]!r}, not {value!r}:"
          " choose another --workdir, or remove this one"
        )
    check_data(workdir, config, data)
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / DATA, data)
    write_json(path, config_lib.to_dict(config))
  except OSError as error:
    raise ConfigError(
      f"cannot write to --workdir {workdir}: {files.reason(error)}"
    ) from error


def check_data(
  workdir: epath.Path, config: Config, data: dict[str, str]
) -> None:
  """`ConfigError` unless `data`, the hashes of the data now, are the run's."""
  path = workdir / DATA
  old = read_object(path) if path.exists() else {}
  for name in data:
    if old.get(name, data[name]) != data[name]:
      raise ConfigError(
        f"{workdir} was trained on data of another {name} than data.path="
        f"{config.data.path} has now: put the old data back, or choose another"
        " --workdir"
      )


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
  """Inside, no other process can train in `workdir`; `ConfigError` if one does.

  On a disk, the operating system releases the lock however the process ends.
  In a bucket, the lock is an object that its owner renews; one that is no
  longer renewed is taken over.
  """
  lock = _leased if files.is_remote(workdir) else _flocked
  with lock(workdir):
    yield


@contextlib.contextmanager
def _flocked(workdir: epath.Path) -> Iterator[None]:
  with pathlib.Path(workdir / LOCK).open("a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      file.seek(0)
      raise _in_use(workdir, file.read()) from error
    file.truncate(0)
    file.write(_owner() + "\n")
    file.flush()
    yield


@contextlib.contextmanager
def _leased(workdir: epath.Path) -> Iterator[None]:
  path = workdir / LOCK
  before = _read_lease(path)
  if before:
    print(
      f"{workdir} was last trained in by {before}, which did not leave it:"
      f" waiting {3 * LEASE_SECONDS:.0f} s for a sign of life",
      file=sys.stderr,
      flush=True,
    )
    time.sleep(3 * LEASE_SECONDS)
    now = _read_lease(path)
    if now not in (before, ""):
      raise _in_use(workdir, now)
  owner, done = f"{_owner()}, {uuid.uuid4().hex[:8]}", threading.Event()
  path.write_text(f"{owner}, renewal 0")

  def renew() -> None:
    for number in itertools.count(1):
      if done.wait(LEASE_SECONDS):
        return
      with contextlib.suppress(Exception):  # the network may come back
        path.write_text(f"{owner}, renewal {number}")

  thread = threading.Thread(target=renew, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
    path.unlink(missing_ok=True)


def _read_lease(path: epath.Path) -> str:
  try:
    return path.read_text()
  except FileNotFoundError:
    return ""


def _owner() -> str:
  return f"process {os.getpid()} on {socket.gethostname()}"


def _in_use(workdir: epath.Path, owner: str) -> ConfigError:
  return ConfigError(
    f"another run trains in {workdir} ({owner.strip() or 'unknown'}): wait for"
    " it, end it, or choose another --workdir"
  )


def code() -> str:
  """A hash of this code and of the versions of the libraries it uses."""
  digest = hashlib.sha256()
  here = pathlib.Path(__file__).resolve().parents[2]
  for package in ("hope_jax", "pallas_kernels"):
    for path in sorted((here / package).rglob("*.py")):
      digest.update(path.relative_to(here).as_posix().encode())
      digest.update(path.read_bytes())
  for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
    digest.update(f"{name} {importlib.metadata.version(name)}".encode())
  return digest.hexdigest()[:16]


def flatten(config: Config) -> Json:
  """Config -> {"group.field": value}."""

  def walk(values: Json, prefix: str):
    for key, value in values.items():
      if isinstance(value, dict):
        yield from walk(value, f"{prefix}{key}.")
      else:
        yield prefix + key, value

  return dict(walk(config_lib.to_dict(config), ""))
