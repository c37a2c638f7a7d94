"""The layout of the library holds: floors, rooms, sizes of signatures."""

import ast

import pytest

from scripts import floors

COMMANDS = {
  "convert",
  "evaluate",
  "export",
  "generate",
  "harness",
  "levels",
  "session",
  "train",
}


def functions():
  for path in floors.LIBRARY.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef):
        yield f"{path.relative_to(floors.LIBRARY)}::{node.name}", node


def test_library_has_at_most_nine_floors_and_no_circle():
  found = floors.floors(floors.rooms())
  assert max(found.values()) <= 9, found
  assert found["config"] == 1


def test_circles_of_rooms_are_found():
  with pytest.raises(ValueError, match="a -> b -> a"):
    floors.floors({"a": {"b"}, "b": {"a"}})
  assert floors.floors({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {
    "a": 3,
    "b": 2,
    "c": 1,
  }


def test_at_the_top_there_are_commands_and_what_they_share():
  tops = {path.stem for path in floors.LIBRARY.glob("*.py")}
  assert tops == COMMANDS | {"__init__", "cli"}


def test_libraries_import_no_command():
  for room, below in floors.rooms().items():
    if room not in COMMANDS:
      assert not below & (COMMANDS | {"cli"}), room


def test_few_functions_have_six_positional_arguments():
  found = [
    name
    for name, node in functions()
    if len([a for a in node.args.args if a.arg not in ("self", "cls")]) >= 6
  ]
  assert len(found) < 8, found
