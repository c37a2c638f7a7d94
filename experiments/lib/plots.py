"""Plots of an experiment, as PNG files."""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.lib.results import TRAIN, VALID, Record
from hope_jax.config import ConfigError
from hope_jax.runs import files


def output(name: str) -> pathlib.Path:
  """A flag's `type`: the path of a plot, refused if it cannot be written."""
  try:
    return pathlib.Path(files.check_output(name, "plot"))
  except ConfigError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


def _axes(width: float, height: float) -> tuple[Any, Any]:
  """A figure of `width` x `height` inches, and its axes."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height))
  return figure, figure.subplots()


def _save(figure: Any, path: pathlib.Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.tight_layout()
  figure.savefig(path, dpi=150)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
  """Mean over the last `window` values (fewer at the start)."""
  total = np.cumsum(np.concatenate([[0.0], values]))
  end = np.arange(1, len(values) + 1)
  start = np.maximum(0, end - window)
  return (total[end] - total[start]) / (end - start)


def _curve(
  records: Sequence[Record], kind: str
) -> tuple[np.ndarray, np.ndarray]:
  """(tokens in millions, mean loss over the records) of TRAIN or VALID."""
  losses: dict[int, list[float]] = {}
  for record in records:
    config = (record.result or {})["config"]["data"]
    tokens = config["batch_size"] * config["sequence_length"]
    if kind in record.curves:
      for step, loss in zip(*record.curves[kind], strict=True):
        losses.setdefault(step * tokens, []).append(loss)
  tokens = sorted(losses)
  return (
    np.array(tokens) / 1e6,
    np.array([np.mean(losses[t]) for t in tokens]),
  )


def loss_curves(
  path: pathlib.Path, rows: Mapping[str, Sequence[Record]], title: str
) -> None:
  """Training loss (line) and validation loss (dots) of each row's trials.

  Nothing is written if trials are done but none of them has kept its losses.
  """
  known = {
    row: [record for record in records if record.curves]
    for row, records in rows.items()
  }
  if any(rows.values()) and not any(known.values()):
    return
  figure, axes = _axes(7, 4.5)
  for row, records in known.items():
    if not records:
      continue
    tokens, loss = _curve(records, TRAIN)
    (line,) = axes.plot(tokens, _smooth(loss, 3), label=row, linewidth=1.2)
    tokens, loss = _curve(records, VALID)
    axes.plot(tokens, loss, "o", color=line.get_color(), markersize=4)
  axes.set_xlabel("training tokens (millions)")
  axes.set_ylabel("loss (nats per token); dots: validation")
  axes.set_title(title)
  axes.grid(alpha=0.3)
  if axes.lines:
    axes.legend(fontsize=8)
  _save(figure, path)


def bars(
  path: pathlib.Path,
  rows: Mapping[str, Mapping[str, Sequence[float]]],
  *,
  title: str,
  ylabel: str,
) -> None:
  """One bar per row and series: the mean; one dot per seed.

  `rows` maps a row to its series, `{"Titans": {"8 pairs": [90.0, 91.2]}}`.
  """
  series = list(dict.fromkeys(key for row in rows.values() for key in row))
  figure, axes = _axes(2 + 0.8 * len(rows), 4.5)
  width = 0.8 / max(1, len(series))
  for j, name in enumerate(series):
    color = f"C{j}"
    axes.bar(0, 0, color=color, alpha=0.6, label=name)  # for the legend
    for i, row in enumerate(rows.values()):
      values = row.get(name)
      if values:
        x = i + (j - (len(series) - 1) / 2) * width
        axes.bar(x, np.mean(values), width, color=color, alpha=0.6)
        axes.plot([x] * len(values), values, "k.", markersize=4)
  axes.set_xticks(range(len(rows)), list(rows), rotation=30, ha="right")
  axes.set_ylabel(ylabel)
  axes.set_title(title)
  axes.grid(axis="y", alpha=0.3)
  if len(series) > 1:
    axes.legend(fontsize=8)
  _save(figure, path)


def lines(
  path: pathlib.Path,
  curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  *,
  title: str,
  xlabel: str,
  ylabel: str,
) -> None:
  """Curves name -> (x, y) on doubly logarithmic axes."""
  figure, axes = _axes(6, 4)
  for name, (x, y) in curves.items():
    axes.loglog(x, y, "o-", label=name, base=2)
  axes.set_xlabel(xlabel)
  axes.set_ylabel(ylabel)
  axes.set_title(title)
  axes.grid(alpha=0.3)
  if curves:
    axes.legend(frameon=False)
  _save(figure, path)
