"""docs/equations.md names functions and tests that exist."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "equations.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)))


def defined(path):
  """Names of the functions and classes at a module's top."""
  kinds = ast.FunctionDef, ast.ClassDef
  tree = ast.parse((ROOT / path).read_text())
  return {node.name for node in tree.body if isinstance(node, kinds)}


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_what_equations_name_exists(path, name):
  assert (ROOT / path).is_file()
  assert name in defined(path)


def test_every_section_names_its_functions_and_tests():
  sections = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
  assert len(sections) >= 10
  for section in sections:
    assert "\nImplemented by `" in section, section[:40]
    assert re.search(r"^Checked by `tests/", section, re.MULTILINE)
