"""Held-out books: English novels to train on, whole long novels to test on.

`prepare` makes the folder of configs/books.py from the public-domain texts in
`novels/` (training; some whole novels for validation) and `longbooks/` (test).
No book is in two parts.  Typographic quotes and dashes become ASCII everywhere,
because the two collections differ in them and a memory would get credit for
learning an encoding.

  train.txt  all other novels
  valid.txt  test.txt   a passage of every held-out book
  long/*.txt            the test books, whole
"""

import argparse
import pathlib

from etils import epath

from experiments.trials import ROOT
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


def prepare(source: pathlib.Path, folder: pathlib.Path = FOLDER) -> None:
  """Writes all parts to `folder`."""
  novels = {path.stem: path for path in (source / "novels").glob("*.txt")}
  books = sorted((source / "longbooks").glob("*.txt"))
  train = sorted(set(novels) - set(VALIDATION))
  if not (train and books and set(VALIDATION) <= set(novels)):
    raise ConfigError(
      f"{source} must hold novels/*.txt (with {', '.join(VALIDATION)}) and"
      " longbooks/*.txt: set --data to their folder"
    )
  (folder / "long").mkdir(parents=True, exist_ok=True)
  whole = {path.name: read(path) for path in books}
  for name, content in whole.items():
    (folder / "long" / name).write_text(content)
  passages = {
    "valid": [read(novels[stem]) for stem in VALIDATION],
    "test": list(whole.values()),
  }
  for split, found in passages.items():
    parts = [content[SKIP : SKIP + PASSAGE] for content in found]
    (folder / f"{split}.txt").write_text("".join(parts))
  (folder / "train.txt").write_text("".join(read(novels[s]) for s in train))


def prepare_for(flags: argparse.Namespace) -> None:
  """From an experiment's `--data`."""
  prepare(pathlib.Path(flags.data))
