"""Counts the floors of the library: the longest chain of imports in it.

python -m scripts.floors

A room is a package of `hope_jax`, or a module at its top (the commands).  A
room that imports no other is on floor 1; any other is one floor above the
highest that it imports.  Imports within functions count, too.
"""

import ast
import functools
import pathlib
from collections import defaultdict
from collections.abc import Iterator, Mapping

LIBRARY = pathlib.Path(__file__).parents[1] / "hope_jax"


def imported(path: pathlib.Path) -> Iterator[str]:
  """Rooms of the library that a module imports something from."""
  for node in ast.walk(ast.parse(path.read_text())):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
      library, _, rest = name.partition(".")
      if library == LIBRARY.name and rest:
        yield rest.split(".")[0]


def rooms() -> dict[str, set[str]]:
  """Every room -> the rooms that it imports."""
  found = defaultdict(set)
  for path in sorted(LIBRARY.rglob("*.py")):
    room = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
    if room != "__init__":
      found[room].update(set(imported(path)) - {room})
  return dict(found)


def floors(found: Mapping[str, set[str]]) -> dict[str, int]:
  """Every room -> its floor; `ValueError` where rooms import each other."""

  @functools.cache
  def floor(room: str, below: tuple[str, ...] = ()) -> int:
    if room in below:
      circle = " -> ".join((*below[below.index(room) :], room))
      raise ValueError(f"rooms import each other: {circle}")
    down = (floor(other, (*below, room)) for other in sorted(found[room]))
    return 1 + max(down, default=0)

  return {room: floor(room) for room in found}


def main() -> None:
  found = rooms()
  for room, floor in sorted(floors(found).items(), key=lambda x: (x[1], x[0])):
    print(f"{floor}  {room:12} {' '.join(sorted(found[room]))}")


if __name__ == "__main__":
  main()
