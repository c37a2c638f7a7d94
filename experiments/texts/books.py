"""Held-out books: English novels to train on, whole long novels to test on.

`prepare` makes the folder of configs/books.py from the public-domain texts in
`novels/` (training; some whole novels for validation) and `longbooks/` (test).
No book is in two splits.  Typographic quotes and dashes become ASCII, because
the two collections differ in them and a memory would get credit for learning an
encoding.

  train.txt  all other novels
  valid.txt  test.txt   a passage of every held-out book
  long/*.txt            the test books, whole
"""

import argparse
import pathlib

from etils import epath

from experiments.lib.trials import ROOT
from hope_jax.config import ConfigError
from hope_jax.data import text

FOLDER = ROOT / "runs" / "books"  # as in configs/books.py

VALIDATION = (
  "Burnett_Garden_1911",
  "Cbronte_Jane_1847",
  "Doyle_Hound_1902",
  "Eliot_Adam_1859",
)
PASSAGE = 32768  # characters of every held-out book
SKIP = 16384  # title and table of contents
ASCII = str.maketrans(
  {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "..."}
)


def read(path: pathlib.Path) -> str:
  """A book with ASCII quotes and dashes."""
  return text.read(epath.Path(path)).tobytes().decode().translate(ASCII)


def splits(source: pathlib.Path) -> dict[str, dict[str, str]]:
  """Split -> book -> text: whole novels to train on, a passage of every other
  book, and, as `long`, the whole test books."""
  novels = {path.stem: path for path in (source / "novels").glob("*.txt")}
  books = sorted((source / "longbooks").glob("*.txt"))
  train = sorted(set(novels) - set(VALIDATION))
  if not (train and books and set(VALIDATION) <= set(novels)):
    raise ConfigError(
      f"{source} must hold novels/*.txt (with {', '.join(VALIDATION)}) and"
      " longbooks/*.txt: set --data to their folder"
    )
  passage = slice(SKIP, SKIP + PASSAGE)
  whole = {path.stem: read(path) for path in books}
  return {
    "train": {stem: read(novels[stem]) for stem in train},
    "valid": {stem: read(novels[stem])[passage] for stem in VALIDATION},
    "test": {stem: content[passage] for stem, content in whole.items()},
    "long": whole,
  }


def prepare(source: pathlib.Path, folder: pathlib.Path = FOLDER) -> None:
  """Writes all parts to `folder`."""
  parts = splits(source)
  (folder / "long").mkdir(parents=True, exist_ok=True)
  for stem, content in parts.pop("long").items():
    (folder / "long" / f"{stem}.txt").write_text(content)
  for split, found in parts.items():
    (folder / f"{split}.txt").write_text("".join(found.values()))


def prepare_for(flags: argparse.Namespace) -> None:
  """Prepares the books from an experiment's `--data`."""
  prepare(pathlib.Path(flags.data))
