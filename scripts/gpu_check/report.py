"""results.json and report.md of a folder, rewritten after every job."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scripts.gpu_check import plan
from scripts.gpu_check.children import DONE, Outcome
from scripts.gpu_check.plan import Row

RESULTS, REPORT = "results.json", "report.md"
_HIDDEN = ("row", "at_seconds")  # not shown in tables


def write(
  folder: pathlib.Path,
  machine: Mapping[str, Any],
  outcomes: Iterable[Outcome],
) -> None:
  """Writes both files; a reader never sees half of one."""
  outcomes = list(outcomes)
  content = {
    "machine": machine,
    "jobs": [outcome._asdict() for outcome in outcomes],
  }
  _replace(folder / RESULTS, json.dumps(content, indent=1) + "\n")
  _replace(folder / REPORT, markdown(machine, outcomes))


def read(folder: pathlib.Path) -> tuple[Row, list[Outcome]] | None:
  """(machine, outcomes) of an earlier run into this folder, if there was one.

  Raises:
    ValueError: results.json is not what `write` writes.
  """
  path = folder / RESULTS
  if not path.exists():
    return None
  try:
    content = json.loads(path.read_text())
    jobs = [Outcome(**{**x, "rows": tuple(x["rows"])}) for x in content["jobs"]]
    return content["machine"], jobs
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} is no results of this script") from error


def _replace(path: pathlib.Path, text: str) -> None:
  part = path.with_name(f"{path.name}.{os.getpid()}")
  part.write_text(text)
  part.replace(path)


def markdown(machine: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
  """A table for every part, and a line for every job that is not done."""
  text = "# GPU check\n\n"
  for name, value in machine.items():
    if name not in _HIDDEN:
      text += f"* {name}: {_cell(value)}\n"
  for part in plan.PARTS:
    of_part = [outcome for outcome in outcomes if outcome.part == part]
    if not of_part:
      continue
    text += f"\n## {part}\n"
    rows = [row for outcome in of_part for row in outcome.rows]
    for group in _by_columns(rows):
      text += f"\n{table(group)}"
    problems = [outcome for outcome in of_part if outcome.status != DONE]
    if problems:
      text += "\n"
    for job in problems:
      why = f": {job.message}" if job.message else ""
      text += f"* {job.job}: {job.status}{why}\n"
  return text


def _by_columns(rows: Sequence[Row]) -> list[list[Row]]:
  """Rows of the same `table`, in the order of appearance."""
  groups: dict[str, list[Row]] = {}
  for row in rows:
    groups.setdefault(row.get("table", ""), []).append(row)
  return list(groups.values())


def table(rows: Sequence[Row]) -> str:
  """Markdown; columns are all keys that any row has, nested ones left out."""
  keys = dict.fromkeys(key for row in rows for key in row)
  keys = [key for key in keys if key not in (*_HIDDEN, "table")]
  nested = {k for row in rows for k, v in row.items() if isinstance(v, dict)}
  keys = [key for key in keys if key not in nested]
  lines = [keys, ["---"] * len(keys)]
  for row in rows:
    row = {**row, "pass": "**no**"} if row.get("pass") is False else row
    lines.append([_cell(row.get(key)) for key in keys])
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
  if value is None:
    return ""
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, int):
    return f"{value:,}"
  if isinstance(value, float):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
  if isinstance(value, list):
    return "; ".join(_cell(item) for item in value)
  return str(value).replace("|", "\\|").replace("\n", " ")
