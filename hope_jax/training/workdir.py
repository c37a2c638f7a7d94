"""The folder of one run: config.json, metrics.jsonl, result.json, checkpoints.

Files appear atomically (written beside, then renamed), so that a run that is
killed leaves either the old file or the new one.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

from hope_jax import config as config_lib
from hope_jax.config import Config, ConfigError

CONFIG, METRICS, RESULT = "config.json", "metrics.jsonl", "result.json"
LOCK = "lock"
MAY_CHANGE = (
  "mesh.",
  "train.wandb",
  "train.keep_",
  "train.hang_seconds",
  "data.workers",
  "data.timeout",
)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes `value` as JSON, atomically."""
  beside = path.with_name(f"{path.name}.tmp{os.getpid()}")
  beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
  beside.replace(path)


def read_config(workdir: pathlib.Path) -> Config:
  """The config of a run; `ConfigError` if `workdir` holds none."""
  path = workdir / CONFIG
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise ConfigError(
      f"{workdir} is not the folder of a run: cannot read {CONFIG}"
      f" ({error.strerror})"
    ) from error
  except ValueError as error:
    raise ConfigError(f"{path} is not JSON: {error}") from error
  return config_lib.from_config_dict(values)


def read_result(workdir: pathlib.Path) -> dict[str, Any] | None:
  """result.json of a finished run, or None."""
  path = workdir / RESULT
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ConfigError(f"{path} is not JSON: {error}") from error


def claim(workdir: pathlib.Path, config: Config, *, write: bool) -> None:
  """Makes `workdir` the folder of a run of `config`, or checks that it is.

  The mesh and wandb may change between the sessions of a run, nothing else
  may.  With `write` off (all processes but one) it only checks.
  """
  path = workdir / CONFIG
  if path.exists():
    old, new = (_flatten(c) for c in (read_config(workdir), config))
    for name, value in new.items():
      if old[name] != value and not name.startswith(MAY_CHANGE):
        raise ConfigError(
          f"{workdir} holds a run with {name}={old[name]!r}, not {value!r}:"
          " choose another --workdir, or remove this one"
        )
  elif write:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      write_json(path, config_lib.to_dict(config))
    except OSError as error:
      raise ConfigError(
        f"cannot write to --workdir {workdir}: {error.strerror}"
      ) from error


@contextlib.contextmanager
def locked(workdir: pathlib.Path, *, only_if: bool = True) -> Iterator[None]:
  """Inside, no other process can train in `workdir`; `ConfigError` if one does.

  The operating system lets go of the lock when the process ends in any way.
  """
  if not only_if:
    yield
    return
  path = workdir / LOCK
  with path.open("a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      file.seek(0)
      owner = file.read().strip() or "unknown"
      raise ConfigError(
        f"another run trains in {workdir} ({owner}): wait for it, end it, or"
        " choose another --workdir"
      ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield


def _flatten(config: Config) -> dict[str, Any]:
  """Config -> {"group.field": value}."""

  def walk(values: dict[str, Any], prefix: str):
    for key, value in values.items():
      if isinstance(value, dict):
        yield from walk(value, f"{prefix}{key}.")
      else:
        yield prefix + key, value

  return dict(walk(config_lib.to_dict(config), ""))
