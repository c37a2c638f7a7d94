"""WikiText-2 and novels in subwords: the data of configs/subwords.py.

One SentencePiece tokenizer for both, trained on their training splits alone.
WikiText-2 has its own splits, one document each; the novels are split by whole
books (`books.py`).  A second call does only what is missing:

  text/NAME/SPLIT/*.txt   the documents
  tokenizer.model
  NAME/SPLIT/             prepared data, `scripts/prepare_data.py`
  sizes.json              sizes of the test splits, written when all is done
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from configs.subwords import Scale
from experiments.lib.trials import ROOT
from experiments.texts import books
from hope_jax.data import prepare as prepare_lib
from hope_jax.data import records, text, tokenizer
from hope_jax.runs import files

SIZES = "sizes.json"
LICENCES = {"wikitext2": "CC BY-SA", "novels": "public domain (US)"}


@dataclasses.dataclass(frozen=True)
class Size:
  """Size of a test split: its targets, and the bytes and words of its text.

  Words are separated by whitespace.
  """

  tokens: int
  bytes: int
  words: int


def read(source: pathlib.Path) -> dict[str, dict[str, dict[str, str]]]:
  """Text -> split -> document -> content, from folders `wikitext2`, `novels`
  and `longbooks`."""
  wikitext = {}
  for split in text.SPLITS:
    path = epath.Path(source / "wikitext2" / f"{split}.txt")
    wikitext[split] = {split: text.read(path).tobytes().decode()}
  novels = books.splits(source)
  del novels["long"]
  return {"wikitext2": wikitext, "novels": novels}


def prepare(
  source: pathlib.Path, scale: Scale, folder: pathlib.Path | None = None
) -> None:
  """Makes the scale's folder from the texts in `source`."""
  folder = folder or ROOT / scale.folder
  if (folder / SIZES).exists():
    return
  print(f"preparing {scale.folder}: minutes, once", flush=True)
  texts = read(source)
  model = folder / tokenizer.MODEL
  if not model.exists():
    training = [c for name in texts for c in texts[name]["train"].values()]
    content = tokenizer.train(training, scale.pieces)
    with files.writing(epath.Path(model)) as temporary:
      temporary.write_bytes(content)
  sizes = {}
  for name, splits in texts.items():
    for split, documents in splits.items():
      size = _prepare_split(folder, name, split, documents, scale)
      if split == "test":
        sizes[name] = dataclasses.asdict(size)
  files.write_text(epath.Path(folder / SIZES), json.dumps(sizes))


def _prepare_split(
  folder: pathlib.Path,
  name: str,
  split: str,
  documents: Mapping[str, str],
  scale: Scale,
) -> Size:
  """Prepares one split of one text unless it exists; returns its size."""
  if not (folder / name / split / records.MANIFEST).exists():
    inputs = folder / "text" / name / split
    inputs.mkdir(parents=True, exist_ok=True)
    for document, content in documents.items():
      (inputs / f"{document}.txt").write_bytes(content.encode())
    prepare_lib.prepare(
      [str(inputs)],
      str(folder / name),
      str(folder / tokenizer.MODEL),
      prepare_lib.Options(length=scale.length, align=scale.align, split=split),
      licence=LICENCES[name],
      workers=1,
    )
  manifest = records.read_manifest(epath.Path(folder / name / split))
  return Size(
    tokens=manifest.counts["tokens"],
    bytes=sum(len(content.encode()) for content in documents.values()),
    words=sum(len(content.split()) for content in documents.values()),
  )


def sizes(scale: Scale, folder: pathlib.Path | None = None) -> dict[str, Size]:
  """The sizes of the prepared texts' test splits."""
  path = (folder or ROOT / scale.folder) / SIZES
  found: dict[str, dict[str, Any]] = json.loads(path.read_text())
  return {name: Size(**size) for name, size in found.items()}
