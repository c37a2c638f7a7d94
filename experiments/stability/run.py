"""Stability of the memories: critical rates, long streams, literal settings.

python -m experiments.stability.run --part=rates
python -m experiments.stability.run --part=battery --workdir=runs/x
python -m experiments.stability.run --part=literal

Every part writes PART.json and PART.md; a case that is already in the JSON is
not run again.  See README.md for the protocol.
"""

import argparse
import datetime
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from experiments.lib import tables, timing
from experiments.lib.results import read_json
from experiments.lib.trials import ROOT
from experiments.stability import battery, rates, reading
from hope_jax.config import ConfigError
from hope_jax.runs import files

MODELS = ("titans", "hope")
DTYPES = ("float32", "bfloat16")
CHUNK_LENGTHS = (16, 32, 64, 128, 256)  # the config's first
TOKENS = 65536
OTHER_SHARE = 4  # streams at the other chunk lengths are 4 times shorter
LITERAL_CHUNK_LENGTHS = (16, 64)
LITERAL_CHUNKS = 64
QUICK_TOKENS = 2048
QUICK_VARIANTS = ("defaults", "all")
QUICK_CHUNKS = 32
ENOUGH_CHANGE = 1e-3  # required in float32

Case = dict[str, Any]
Cases = Mapping[str, Case]


class Planned(NamedTuple):
  """A case of the results: its name, and the function that makes it."""

  key: str
  make: Callable[[], Case]


# The cases of each part.


def plan_rates(flags: argparse.Namespace) -> Iterator[Planned]:
  lengths = rates.CHUNK_LENGTHS[:2] if flags.quick else rates.CHUNK_LENGTHS
  for rule in rates.RULES:
    for momentum in rates.MOMENTA:
      for length in lengths:
        yield Planned(
          f"{rule}; C {length}; momentum {momentum}",
          functools.partial(rates.measure, rule, length, momentum),
        )


@functools.cache
def _initial(model: str) -> reading.Source:
  config = reading.default_config(model).model
  return reading.initial_source(model, config)


def _battery_cases(flags: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
  """(dtype, chunk length, tokens) of all streams."""
  if flags.quick:
    yield DTYPES[0], CHUNK_LENGTHS[0], min(flags.tokens, QUICK_TOKENS)
    return
  for dtype in DTYPES:
    for length in CHUNK_LENGTHS:
      share = 1 if length == CHUNK_LENGTHS[0] else OTHER_SHARE
      yield dtype, length, flags.tokens // share


def plan_battery(flags: argparse.Namespace) -> Iterator[Planned]:
  """All streams; those of a shape follow each other and share compiled code."""
  text = reading.held_out(flags.text)
  name = pathlib.Path(flags.text).name if flags.text else "held-out text"
  trained = [reading.trained_source(epath.Path(w)) for w in flags.workdir]
  for model in flags.model:
    own = [source for source in trained if source.model == model]
    weights = ["initial", *(source.weights for source in own)]
    if len(set(weights)) < len(weights):
      raise ConfigError(f"two folders of --workdir are called {weights[-1]!r}")
    for dtype, length, count in _battery_cases(flags):
      for index, label in enumerate(weights):

        def make(
          model=model, own=own, index=index, dtype=dtype, length=length, n=count
        ):
          source = own[index - 1] if index else _initial(model)
          case = battery.measure(
            source, text, chunk_length=length, dtype=dtype, count=n
          )
          return {**case, "text": name}

        yield Planned(
          f"{model}; {label}; {dtype}; C {length}; {count} tokens; {name}", make
        )


def plan_literal(flags: argparse.Namespace) -> Iterator[Planned]:
  text = reading.held_out(flags.text)
  lengths, chunks = LITERAL_CHUNK_LENGTHS, LITERAL_CHUNKS
  variants = tuple(battery.VARIANTS)
  if flags.quick:
    lengths, chunks, variants = lengths[:1], QUICK_CHUNKS, QUICK_VARIANTS
  for model in flags.model:
    for length in lengths:
      for variant in variants:

        def make(model=model, length=length, variant=variant):
          return battery.measure_literal(
            _initial(model),
            text,
            variant=variant,
            chunk_length=length,
            chunks=chunks,
          )

        yield Planned(f"{model}; C {length}; {chunks} chunks; {variant}", make)


# Tables.


def rates_table(cases: Cases) -> str:
  """A line per rule and chunk length; `(...)`: the expected value."""
  lines: dict[tuple[str, int], dict[str, str]] = {}
  for case in cases.values():
    key = case["rule"], case["chunk_length"]
    line = lines.setdefault(key, {"rule": key[0], "C": str(key[1])})
    found = case["found"]
    shown = f">{rates.LIMIT:g}" if found is None else f"{found:.3f}"
    mark = "" if case["agrees"] else " DIFFERS"
    line[f"momentum {case['momentum']:g}"] = (
      f"{shown} ({case['expected']}){mark}"
    )
  return tables.markdown(list(lines.values()))


def _percent(moved: Mapping[str, float | None]) -> str:
  return ", ".join(
    f"{name} {'-' if x is None else f'{100 * x:.1f}'}"
    for name, x in moved.items()
  )


def _numbers(values: Sequence[float | None]) -> str:
  return " / ".join("inf" if x is None else f"{x:.3g}" for x in values)


def battery_table(cases: Cases) -> str:
  """A line per case; three numbers are those of repeated / noise / text.

  SMALL: below the required change of the logits, which is for float32.
  """
  lines = []
  order = lambda case: (
    MODELS.index(case["model"]),
    DTYPES.index(case["dtype"]),
    case["chunk_length"],
  )
  for case in sorted(cases.values(), key=order):
    streams = case["streams"].values()
    shown = [case["streams"][name] for name in ("repeated", "noise", "text")]
    finite = [s["state_finite"] and s["logits_finite"] for s in streams]
    change = case["change"]
    is_short = change is not None and change < ENOUGH_CHANGE
    is_short = is_short and case["dtype"] == "float32"
    lines.append(
      {
        "model": f"{case['model']}, {case['weights']}",
        "activations": case["dtype"],
        "C": str(case["chunk_length"]),
        "tokens": f"{case['tokens']:,}",
        "finite": "yes" if all(finite) else "NO",
        "max state": _numbers([s["max_state"] for s in shown]),
        "growth": _numbers([s["growth"] for s in shown]),
        "change": _numbers([change]) + (" SMALL" if is_short else ""),
        "median change": _numbers([case["change_median"]]),
        "moved %, text": _percent(case["streams"]["text"]["moved"]),
      }
    )
  return tables.markdown(lines)


def _outcome(case: Case) -> str:
  events = []
  if case["first_large"] not in (None, case["first_nonfinite"]):
    events.append(f"above 1e6 after chunk {case['first_large']}")
  if case["first_nonfinite"]:
    events.append(f"not finite after chunk {case['first_nonfinite']}")
  return ", ".join(events) or "bounded"


def literal_table(cases: Cases) -> str:
  """A line per setting and model; `largest`: the level with the largest state
  one chunk before a state blows up, or at the end."""
  order = lambda case: (
    MODELS.index(case["model"]),
    case["chunk_length"],
    list(battery.VARIANTS).index(case["variant"]),
  )
  return tables.markdown(
    [
      {
        "model": case["model"],
        "C": str(case["chunk_length"]),
        "setting": case["variant"],
        f"in {case['chunks']} chunks": _outcome(case),
        "max state": _numbers([case["max_state"]]),
        "growth": ""
        if _outcome(case) != "bounded"
        else f"{case['growth']:.2f}",
        "largest": case["level"],
      }
      for case in sorted(cases.values(), key=order)
    ]
  )


PARTS = {
  "rates": (plan_rates, rates_table),
  "battery": (plan_battery, battery_table),
  "literal": (plan_literal, literal_table),
}


def caption(cases: Cases) -> str:
  """Dates and machines of the cases: the line below a table."""
  dates = sorted({case["date"] for case in cases.values()})
  machines = sorted({case["machine"] for case in cases.values()})
  return f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, " + (
    f"{'; '.join(machines)}, seed 0.\n"
  )


def write(folder: pathlib.Path, part: str, cases: Cases) -> None:
  """PART.json with all cases, PART.md with their table."""
  folder.mkdir(parents=True, exist_ok=True)
  content = {"experiment": "stability", "part": part, "cases": cases}
  text = json.dumps(content, indent=1, allow_nan=False) + "\n"
  files.write_text(epath.Path(folder / f"{part}.json"), text)
  table = f"{PARTS[part][1](cases)}\n{caption(cases)}"
  files.write_text(epath.Path(folder / f"{part}.md"), table)


def run(part: str, flags: argparse.Namespace) -> Cases:
  """Runs what is missing of a part; returns all of its cases."""
  known = read_json(flags.out / f"{part}.json") or {}
  cases: dict[str, Case] = known.get("cases") or {}
  for key, make in PARTS[part][0](flags):
    if key in cases:
      continue
    start = time.monotonic()
    case = make()
    cases[key] = {
      **case,
      "seconds": round(time.monotonic() - start, 1),
      "date": datetime.date.today().isoformat(),
      "machine": timing.machine(),
    }
    write(flags.out, part, cases)
    print(f"{key}: {cases[key]['seconds']:.1f} s", flush=True)
  write(flags.out, part, cases)  # the table, even if nothing was missing
  return cases


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser("python -m experiments.stability.run")
  parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
  parser.add_argument(
    "--out",
    type=pathlib.Path,
    default=ROOT / "experiments/stability/results",
    help="folder of the results",
  )
  parser.add_argument("--tokens", type=int, default=TOKENS, help="per stream")
  parser.add_argument("--text", help="a file instead of the held-out text")
  parser.add_argument(
    "--workdir",
    action="append",
    default=[],
    help="folder of a run on text, for trained weights; more than one is fine",
  )
  parser.add_argument(
    "--model", choices=MODELS, action="append", help="default: all"
  )
  parser.add_argument("--quick", action="store_true", help="a few short cases")
  flags = parser.parse_args(argv)
  flags.model = flags.model or MODELS
  return flags


def main(argv: Sequence[str] | None = None) -> int:
  flags = arguments(argv)
  try:
    files.check_folder(str(flags.out), "out")
    for part in PARTS if flags.part == "all" else (flags.part,):
      cases = run(part, flags)
      print(f"\n{PARTS[part][1](cases)}\n{caption(cases)}")
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
