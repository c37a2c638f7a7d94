"""Kernels of a compiled program, counted in its optimised HLO text.

From the entry on, every instruction that runs something counts once; the body
of a `while` counts as often as its `known_trip_count` says or, without one,
body and condition count once; of a conditional's branches, the one that runs
the most counts.
"""

import re
from collections import Counter
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*)? \{$")
_OPCODE = re.compile(r" = .*?[ )]([a-z][a-z0-9\-]*)\(")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_CALLED = re.compile(
  r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
)
_BODY = re.compile(r"body=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")

# Opcodes that run nothing on the device, or are counted by what they call.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("while", "call", "conditional", "async-start", "after-all"),
  *("opt-barrier", "partition-id", "replica-id", "add-dependency", "domain"),
}


class Instruction(NamedTuple):
  opcode: str
  line: str


class Count(NamedTuple):
  """Instructions run in one call, by opcode; loops whose length is unknown."""

  run: Counter[str]
  unknown_loops: int

  @property
  def kernels(self) -> int:
    return sum(self.run.values())


def parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
  """(name of the entry, instructions of every computation)."""
  entry, name, found = "", "", {}
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      name = match[2]
      found[name] = []
      entry = name if match[1] else entry
    elif match := _OPCODE.search(line):
      found.setdefault(name, []).append(Instruction(match[1], line))
  if not entry:
    raise ValueError("this HLO text has no ENTRY")
  return entry, found


def count(text: str) -> Count:
  """Counts the instructions that the whole program runs."""
  entry, computations = parse(text)
  known: dict[str, Count] = {}

  def total(name: str) -> Count:
    if name not in known:
      run, unknown = Counter(), 0
      for instruction in computations.get(name, ()):
        inner, times = _inner(instruction, total)
        for part in inner:
          unknown += part.unknown_loops
          run.update({k: times * n for k, n in part.run.items()})
        is_loop = instruction.opcode == "while"
        unknown += is_loop and not _TRIPS.search(instruction.line)
        opcode = instruction.opcode
        if opcode not in _FREE and not opcode.endswith(("-done", "-update")):
          run[opcode] += 1
      known[name] = Count(run, unknown)
    return known[name]

  return total(entry)


def _inner(instruction: Instruction, total) -> tuple[list[Count], int]:
  """Counts of what an instruction calls, and how often it does."""
  opcode, line = instruction
  if opcode == "while":
    trips = _TRIPS.search(line)
    names = _BODY.findall(line)
    if trips is None:  # a GPU that knows the number evaluates no condition
      names += _CONDITION.findall(line)
    return [total(name) for name in names], int(trips[1]) if trips else 1
  if opcode == "conditional":
    names = _CALLED.findall(line)
    if branches := _BRANCHES.search(line):
      names += [name.strip().lstrip("%") for name in branches[1].split(",")]
    branches = [total(name) for name in names]
    return [max(branches, key=lambda part: part.kernels)], 1
  if opcode in ("call", "async-start"):
    return [total(name) for name in _CALLED.findall(line)], 1
  return [], 1


def instructions(text: str) -> Counter[str]:
  """Number of instructions in the text by opcode, however often they run."""
  found: Counter[str] = Counter()
  for part in parse(text)[1].values():
    found.update(instruction.opcode for instruction in part)
  return found
