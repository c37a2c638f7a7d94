"""The folder of one run: config.json, metrics.jsonl, result.json, checkpoints.

Files appear atomically (written beside, then renamed), so that a run that is
killed leaves either the old file or the new one.
"""

import json
import os
import pathlib
from typing import Any

from hope_jax import config as config_lib
from hope_jax.config import Config, ConfigError

CONFIG, METRICS, RESULT = "config.json", "metrics.jsonl", "result.json"
MAY_CHANGE = ("mesh.", "train.wandb")


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


def _flatten(config: Config) -> dict[str, Any]:
  """Config -> {"group.field": value}."""

  def walk(values: dict[str, Any], prefix: str):
    for key, value in values.items():
      if isinstance(value, dict):
        yield from walk(value, f"{prefix}{key}.")
      else:
        yield prefix + key, value

  return dict(walk(config_lib.to_dict(config), ""))
