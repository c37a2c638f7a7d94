"""Books held out whole."""

import pytest

from experiments.texts import books
from hope_jax.config import ConfigError


@pytest.fixture
def source(tmp_path):
  for folder, names in {
    "novels": (*books.VALIDATION, "Other_1900"),
    "longbooks": ("one", "two"),
  }.items():
    (tmp_path / folder).mkdir()
    for name in names:
      content = f"{name} " + "‘a’—é" * books.PASSAGE
      (tmp_path / folder / f"{name}.txt").write_text(content)
  return tmp_path


def test_no_book_is_in_two_parts(source, tmp_path):
  folder = tmp_path / "books"
  books.prepare(source, folder)
  parts = {s: (folder / f"{s}.txt").read_text() for s in ("train", "valid")}
  assert parts["train"].startswith("Other_1900 'a'--é")
  assert not any(name in parts["train"] for name in books.VALIDATION)
  assert len(parts["valid"]) == len(books.VALIDATION) * books.PASSAGE
  test = (folder / "test.txt").read_text()
  whole = (folder / "long" / "two.txt").read_text()
  assert test[books.PASSAGE :] == whole[books.SKIP :][: books.PASSAGE]


def test_folder_without_books_is_named(tmp_path):
  with pytest.raises(ConfigError, match="set --data to their folder"):
    books.prepare(tmp_path, tmp_path / "books")
