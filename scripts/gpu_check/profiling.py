"""A profile of a training step: kernels, launches, and when the GPU is idle.

Three rows: what the compiler reports (`cost_analysis`, kernels counted in the
optimised HLO); the time of a step; the GPU's streams in a trace of one step.
Then the kernels that take the most time.
"""

import pathlib
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from scripts.gpu_check import hlo, training
from scripts.gpu_check.plan import Row, first_line

TOP = 15  # kernels that are listed
_COPIES = ("memcpy", "memset")


def rows(
  before: Row | None = None, model: str = "hope", tiny: bool = False
) -> Iterator[Row]:
  """before: the row of the model's training steps, which has the batch that
  fits; without it the batch is 1."""
  length = (before or {}).get("T", 64 if tiny else 4096)
  batch = (before or {}).get("B", 1)
  entry = training.build(training.make_config(model, length, batch, tiny))
  head: Row = {"model": model, "B": batch, "T": length}
  yield {**head, "row": "compiler", "table": "compiler", **compiler(entry.run)}
  state, timed = training.timed(entry, training.TINY if tiny else training.FULL)
  step_ms = timed["step ms"]
  yield {
    **head,
    "row": "step",
    "table": "step",
    "step ms": step_ms,
    "steps": timed["steps"],
  }
  row: Row = {**head, "row": "trace", "table": "trace"}
  try:
    events = traced(lambda: entry.run(state, entry.batch))
  except Exception as error:  # a profiler without access to the GPU
    yield {**row, "note": f"no trace: {first_line(error)}"}
    return
  if not events:
    yield {**row, "note": "no GPU streams in the trace"}
    return
  yield row | streams(events) | {"step without trace ms": step_ms}
  yield from heaviest(events)


def compiler(program: Any) -> Row:
  """The compiler's report of a program; `estimated` counts loops once."""
  text = program.as_text()
  counted, static = hlo.count(text), hlo.instructions(text)
  cost = program.cost_analysis() or {}
  if isinstance(cost, list):
    cost = cost[0]
  return {
    "kernels of a step": counted.kernels,
    "fusions": counted.run["fusion"],
    "custom calls": counted.run["custom-call"],
    "copies": counted.run["copy"] + counted.run["copy-start"],
    "while loops": static["while"],
    "of unknown length": counted.unknown_loops,
    "fusions in the text": static["fusion"],
    "custom calls in the text": static["custom-call"],
    "estimated TFLOP": cost.get("flops", 0.0) / 1e12,
    "estimated GB": cost.get("bytes accessed", 0.0) / 1e9,
    "by opcode": dict(counted.run),
  }


class Event(NamedTuple):
  """Something that ran on a stream, in nanoseconds."""

  name: str
  start: float
  duration: float


def traced(run: Any) -> list[Event]:
  """What one call did on the GPU's streams."""
  options = jax.profiler.ProfileOptions()
  options.host_tracer_level = 0
  options.python_tracer_level = 0
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      jax.block_until_ready(run())
    files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
    if not files:
      return []
    return gpu_events(ProfileData.from_file(str(files[-1])))


def gpu_events(data: Any) -> list[Event]:
  """Events of all streams of the GPU's planes, without derived lines."""
  return [
    Event(event.name, event.start_ns, event.duration_ns)
    for plane in data.planes
    if plane.name.startswith("/device:GPU")
    for line in plane.lines
    if line.name.startswith("Stream")
    for event in line.events
  ]


def busy(events: Iterable[Event]) -> float:
  """Nanoseconds in which anything ran."""
  total, end = 0.0, float("-inf")
  for _, start, duration in sorted(events, key=lambda event: event.start):
    stop = start + duration
    total += max(0.0, stop - max(start, end))
    end = max(end, stop)
  return total


def streams(events: list[Event]) -> Row:
  """Launches, and the idle share of the time from the first to the last."""
  first = min(event.start for event in events)
  last = max(event.start + event.duration for event in events)
  copies = [e for e in events if e.name.lower().startswith(_COPIES)]
  working = busy(events)
  return {
    "kernel launches": len(events) - len(copies),
    "copies and fills": len(copies),
    "first to last ms": (last - first) / 1e6,
    "busy ms": working / 1e6,
    "idle %": 100 * (1 - working / max(1.0, last - first)),
    "mean kernel us": working / len(events) / 1e3,
  }


def heaviest(events: list[Event]) -> Iterator[Row]:
  """The kernels that take the most time together."""
  by_name: dict[str, list[float]] = defaultdict(list)
  for event in events:
    by_name[event.name].append(event.duration)
  ranked = sorted(by_name.items(), key=lambda item: -sum(item[1]))
  for name, durations in ranked[:TOP]:
    yield {
      "row": f"kernel {name}",
      "table": "heaviest",
      "kernel": name[:80],
      "launches": len(durations),
      "ms": sum(durations) / 1e6,
      "us each": sum(durations) / len(durations) / 1e3,
    }
