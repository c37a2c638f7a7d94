"""Reports of an experiment: a table per group of trials.

Scores are dicts with the test split's `loss` (nats per target), `accuracy`
and whatever else hope_jax.evaluate reports, for a trained model or for one of
its evaluations.
"""

import datetime
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from experiments.lib import results, switch_off, timing
from experiments.lib.results import DONE, FAILED, Record
from hope_jax.runs import files

Scores = Mapping[str, Any]
# Header -> cell from the scores of a row's seeds.
Columns = Mapping[str, Callable[[Sequence[Scores]], str]]
Line = Mapping[str, str]
TABLE = "table.md"
DESCRIPTION = ("parameters", "tokens", "tokens/s", "peak lr")


def mean_std(values: Iterable[float], digits: int = 3) -> str:
  """`1.846 ± 0.004` (sample deviation); one value: itself; none: a dash."""
  numbers = list(values)
  if not numbers:
    return "-"
  mean = f"{statistics.fmean(numbers):.{digits}f}"
  if len(numbers) == 1:
    return mean
  return f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def accuracy(measured: Iterable[Scores]) -> str:
  """The cell of a column "accuracy %"."""
  return mean_std((100 * s["accuracy"] for s in measured), digits=1)


def markdown(lines: Sequence[Line]) -> str:
  """A table; the first column is left-aligned, the others right-aligned.

  The header is every key in the order of appearance; a key that a line does
  not have is an empty cell, and a column of empty cells is left out.
  """
  if not lines:
    return "(nothing is done yet)\n"
  header = list(dict.fromkeys(key for line in lines for key in line))
  header = [key for key in header if any(line.get(key) for line in lines)]
  cells = [header, *([line.get(key, "") for key in header] for line in lines)]
  widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
  rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
  text = ""
  for row in (cells[0], rule, *cells[1:]):
    padded = [row[0].ljust(widths[0])]
    padded += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
    text += f"| {' | '.join(padded)} |\n"
  return text


def by_row(records: Iterable[Record], group: str) -> dict[str, list[Record]]:
  """The records of a group by row, in the plan's order."""
  rows: dict[str, list[Record]] = {}
  for record in records:
    if record.trial.group == group:
      rows.setdefault(record.trial.row, []).append(record)
  return rows


def final(records: Iterable[Record]) -> list[Record]:
  """The finished trials that count: not those of a learning-rate grid."""
  return [r for r in records if r.status == DONE and r.trial.is_final]


def final_by_row(
  records: Iterable[Record], group: str
) -> dict[str, list[Record]]:
  """The finished trials of a group that count, by row."""
  return {row: final(trials) for row, trials in by_row(records, group).items()}


def accuracies(records: Iterable[Record], group: str) -> dict[str, list[float]]:
  """Test accuracies of a group in percent, of the rows that have any."""
  return {
    row: [100 * scores(record)["accuracy"] for record in done]
    for row, done in final_by_row(records, group).items()
    if done
  }


def scores(record: Record, label: str | None = None) -> Scores:
  """Test scores of a finished trial, or of one of its evaluations."""
  if label is not None:
    return record.evaluations[label]
  result = record.result or {}
  return {"loss": result["test_loss"], "accuracy": result["accuracy"]}


def description(done: Sequence[Record]) -> dict[str, str]:
  """The columns DESCRIPTION of a row's finished trials."""
  if not done:
    return dict.fromkeys(DESCRIPTION, "-")
  found = [record.result or {} for record in done]
  speed = statistics.median(result["tokens_per_second"] for result in found)
  described = (
    f"{found[0]['parameters']:,}",
    f"{found[0]['tokens']:,}",
    f"{speed:,.0f}",
    f"{found[0]['config']['opt']['peak_lr']:g}",
  )
  return dict(zip(DESCRIPTION, described, strict=True))


def _row(
  name: str, records: list[Record], columns: Columns
) -> list[dict[str, str]]:
  """A row's line, and below it one line per evaluation of its models."""
  done = final(records)
  measured = [scores(record) for record in done]
  lines = [{"model": name}]
  lines[0].update((key, cell(measured)) for key, cell in columns.items())
  lines[0].update(description(done))
  if done:
    for label in done[0].evaluations:
      measured = [scores(record, label) for record in done]
      line = {"model": f"{name}, {switch_off.describe(label)}"}
      line.update((key, cell(measured)) for key, cell in columns.items())
      lines.append(line)
  lines[0] |= {"seeds": str(len(done)), "trials": str(len(records))}
  return lines


def table(
  records: Iterable[Record],
  group: str,
  columns: Columns,
  extra: Sequence[Line] = (),
) -> str:
  """The group's rows with mean and deviation over seeds, then `extra`.

  `trials` counts every run behind a row, the learning-rate grid included.
  """
  lines: list[Line] = []
  for name, trials in by_row(records, group).items():
    lines += _row(name, trials, columns)
  return markdown([*lines, *extra])


def caption(records: Sequence[Record]) -> str:
  """Dates and machines of the finished trials, all seeds, how much is done and
  what failed: the lines below a table."""
  done = [record for record in records if record.status == DONE]
  origins = [record.origin for record in done if record.origin]
  today = datetime.date.today().isoformat()
  dates = sorted({origin.date for origin in origins}) or [today]
  machines = sorted({origin.machine for origin in origins})
  seeds = sorted({record.trial.seed for record in records})
  lines = [
    f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))},"
    f" {'; '.join(machines or [timing.machine()])}, seeds"
    f" {', '.join(map(str, seeds))}; {len(done)} of {len(records)} trials done."
  ]
  for record in records:
    if record.status == FAILED:
      lines.append(f"Failed: {record.trial.name}: {record.message}")
  return "\n".join(lines) + "\n"


def publish(
  folder: pathlib.Path,
  name: str,
  records: Sequence[Record],
  text: str,
  **extra: Any,
) -> None:
  """Ends a report: writes `text` to table.md, finished trials and `extra` to
  results.json; prints the text and the names of the files in `folder`.

  Trials that results.json already has stay, unless they were run again.
  """
  folder.mkdir(parents=True, exist_ok=True)
  files.write_text(epath.Path(folder / TABLE), text)
  results.write(folder / results.NAME, name, records, **extra)
  pictures = sorted(path.name for path in folder.glob("*.png"))
  written = ", ".join((results.NAME, TABLE, *pictures))
  print(f"\n{text}\nwritten to {folder}: {written}")
