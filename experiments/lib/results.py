"""results.json: the finished trials of an experiment in one file.

Reports are made from it, and the runner can continue from it on another
machine, without the folders of the trials.  A trial is one line: what it is
(its row, config file, mode and the fields that it sets), the config that it ran
with, its result, its evaluations and its losses over the steps.

The configs of an experiment differ in few fields.  So the file lists only a few
whole configs (`configs`), and a trial names one of them and the fields that
differ (`recorded`).  Configs stay as they were recorded, even if a default
changes later.
"""

import datetime
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from experiments.lib import timing
from experiments.lib.trials import Evaluation, Trial
from hope_jax.config import ConfigError
from hope_jax.runs import files
from hope_jax.runs import workdir as workdir_lib
from hope_jax.training import metrics

NAME = "results.json"
DONE, FAILED, LEFT = "done", "failed", "left"
INTERVALS = 40  # of a curve, which has at most one more point
TRAIN, VALID = "train", "valid"
# Parts of an evaluation that are not published: where its files were, and
# hundreds of numbers whose medians are in `relative_change`.
LEFT_OUT = ("workdir", "dynamics")

# What identifies a trial: name, config file, mode.
Key = tuple[str, str, str]


class Curve(NamedTuple):
  """Losses by step."""

  steps: Sequence[int]
  losses: Sequence[float]


class Origin(NamedTuple):
  """Day and machine of a trial, and the hashes of the data that it read."""

  date: str
  machine: str
  data: Mapping[str, str] = {}


class Record(NamedTuple):
  """A trial and its outcome.

  Attributes:
    status: DONE, FAILED or LEFT.
    result: the content of result.json, `config` included.
    evaluations: label -> the content of the evaluation's file.
    message: why it failed.
    workdir: its folder, which may be missing if the trial was published.
    curves: TRAIN and VALID, thinned; empty if the losses were not kept.
    origin: set if the trial is finished.
  """

  trial: Trial
  status: str
  result: dict[str, Any] | None
  evaluations: dict[str, dict[str, Any]]
  message: str
  workdir: pathlib.Path
  curves: Mapping[str, Curve] = {}
  origin: Origin | None = None


def key(trial: Trial) -> Key:
  """The trial's key in what `read` returns."""
  return trial.name, trial.config, trial.mode


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
  """The JSON object of a file; None if it is missing or holds no object.

  NaN and infinity, which older versions wrote, are read as None.
  """
  try:
    content = json.loads(path.read_text(), parse_constant=lambda _: None)
  except (OSError, ValueError):
    return None
  return content if isinstance(content, dict) else None


# What the folder of a trial holds.


def origin(workdir: pathlib.Path) -> Origin:
  """The origin of a trial that finished in `workdir` on this machine."""
  seconds = (workdir / workdir_lib.RESULT).stat().st_mtime
  date = datetime.date.fromtimestamp(seconds).isoformat()
  return Origin(
    date, timing.machine(), read_json(workdir / workdir_lib.DATA) or {}
  )


def thinned(points: Sequence[tuple[int, float]]) -> Curve:
  """At most INTERVALS + 1 points at equal distances; the last one is kept."""
  stride = max(1, math.ceil((len(points) - 1) / INTERVALS))
  kept = list(points[::stride])
  if kept and kept[-1] != points[-1]:
    kept.append(points[-1])
  losses = [float(f"{loss:.5g}") for _, loss in kept]
  return Curve([step for step, _ in kept], losses)


def curves(workdir: pathlib.Path) -> dict[str, Curve]:
  """The finite losses of a trial, thinned."""
  found: dict[str, list[tuple[int, float]]] = {TRAIN: [], VALID: []}
  for row in metrics.read(epath.Path(workdir)):
    name = row.get("split", row["kind"]) if row["kind"] == "eval" else TRAIN
    is_loss = row["kind"] in ("train", "eval") and name in found
    if is_loss and row["loss"] is not None:  # None: a skipped step
      found[name].append((row["step"], row["loss"]))
  return {name: thinned(points) for name, points in found.items() if points}


# The file.


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """`{"opt": {"b1": 0.9}}` -> `{"opt.b1": 0.9}`."""
  found = {}
  for name, value in config.items():
    if isinstance(value, Mapping):
      found |= _flat(value, f"{prefix}{name}.")
    else:
      found[prefix + name] = value
  return found


def _nested(fields: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `_flat`."""
  config: dict[str, Any] = {}
  for name, value in fields.items():
    *parents, last = name.split(".")
    inner = config
    for parent in parents:
      inner = inner.setdefault(parent, {})
    inner[last] = value
  return config


def _recorded(
  config: Mapping[str, Any], configs: list[dict[str, Any]]
) -> tuple[int, dict[str, Any]]:
  """`config` as the index of the nearest of `configs` and the fields that
  differ; appended to `configs` if none of them has the same fields."""
  flat = json.loads(json.dumps(_flat(config)))  # tuples are lists
  differences = {
    index: {name: x for name, x in flat.items() if base[name] != x}
    for index, base in enumerate(configs)
    if base.keys() == flat.keys()
  }
  if not differences:
    configs.append(flat)
    return len(configs) - 1, {}
  return min(differences.items(), key=lambda item: len(item[1]))


def _line(record: Record, configs: list[dict[str, Any]]) -> dict[str, Any]:
  """A finished trial as a line of the file."""
  trial, result = record.trial, dict(record.result or {})
  at = record.origin or Origin(
    datetime.date.today().isoformat(), timing.machine()
  )
  line = {
    "name": trial.name,
    "group": trial.group,
    "row": trial.row,
    "config": trial.config,
    "mode": trial.mode,
    "overrides": trial.overrides,
    "seed": trial.seed,
    "is_final": trial.is_final,
    "recorded": _recorded(result.pop("config"), configs),
    "date": at.date,
    "machine": at.machine,
    "data": at.data,
    "result": result,
    "evaluations": {
      label: {name: x for name, x in scores.items() if name not in LEFT_OUT}
      for label, scores in record.evaluations.items()
    },
    "curves": record.curves,
  }
  return {name: x for name, x in line.items() if x not in ({}, ())}


def _restored(
  line: Mapping[str, Any], configs: Sequence[dict[str, Any]], folder: Any
) -> Record:
  """The inverse of `_line`."""
  index, fields = line["recorded"]
  config = _nested({**configs[index], **fields})
  evaluations = line.get("evaluations", {})
  trial = Trial(
    group=line["group"],
    row=line["row"],
    name=line["name"],
    config=line["config"],
    mode=line["mode"],
    overrides=line.get("overrides", {}),
    seed=line["seed"],
    evaluations=tuple(Evaluation(label, ()) for label in evaluations),
    is_final=line["is_final"],
  )
  return Record(
    trial,
    DONE,
    {**line["result"], "config": config},
    evaluations,
    "",
    folder / trial.name,
    {name: Curve(*curve) for name, curve in line.get("curves", {}).items()},
    Origin(line["date"], line["machine"], line.get("data", {})),
  )


def read(path: pathlib.Path) -> dict[Key, Record]:
  """The trials of a results.json; none if it is missing or of an earlier
  version, which did not record configs.  ConfigError if it is damaged."""
  if not path.exists():
    return {}
  content = workdir_lib.read_object(epath.Path(path))
  if "configs" not in content:
    return {}
  try:
    records = [
      _restored(line, content["configs"], path.parent)
      for line in content["trials"]
    ]
  except (KeyError, TypeError, ValueError, IndexError) as error:
    raise ConfigError(
      f"{path} is damaged ({type(error).__name__}: {error}): restore it, or"
      " remove it and run the same command again"
    ) from error
  return {key(record.trial): record for record in records}


def _merged(old: Record | None, new: Record) -> Record:
  """`new` with the further evaluations that `old` has of the same training."""
  if old is None or old.result != new.result:
    return new
  return new._replace(evaluations={**old.evaluations, **new.evaluations})


def write(
  path: pathlib.Path, name: str, records: Iterable[Record], **extra: Any
) -> None:
  """Writes `extra` and the finished ones among `records`; trials that the file
  already has are kept."""
  known = read(path)
  for record in records:
    if record.status == DONE:
      known[key(record.trial)] = _merged(known.get(key(record.trial)), record)
  configs: list[dict[str, Any]] = []
  trials = [_line(known[at], configs) for at in sorted(known)]
  content = {"experiment": name, **extra, "configs": configs, "trials": trials}
  files.write_text(epath.Path(path), _text(content))


def _text(content: Mapping[str, Any]) -> str:
  """JSON with a line for each config and trial."""
  dump = lambda x: json.dumps(
    workdir_lib.finite(x), allow_nan=False, separators=(",", ":")
  )
  parts = []
  for name, value in content.items():
    if name in ("configs", "trials") and value:
      lines = ",\n".join(map(dump, value))
      parts.append(f'"{name}": [\n{lines}\n]')
    else:
      parts.append(f'"{name}": {dump(value)}')
  return "{\n" + ",\n".join(parts) + "\n}\n"
