"""The texts of Table 2 in subwords."""

import pathlib

import pytest
from etils import epath

from configs import subwords as config_subwords
from experiments.texts import books, subwords
from hope_jax import config as config_lib
from hope_jax.data import records, tokenizer


@pytest.fixture
def source(tmp_path) -> pathlib.Path:
  """A folder of texts: every document says what it is."""
  novels = [*books.VALIDATION, "Train_A_1900", "Train_B_1901"]
  names = {
    "wikitext2": ["train", "valid", "test"],
    "novels": novels,
    "longbooks": ["long"],
  }
  for folder, documents in names.items():
    for name in documents:
      path = tmp_path / "source" / folder / f"{name}.txt"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(f"{folder} {name} says äh : six seven \n " * 40)
  return tmp_path / "source"


def test_prepare_trains_the_tokenizer_on_training_text_only(
  source, tmp_path, monkeypatch
):
  monkeypatch.setattr(books, "SKIP", 0)
  seen, train = [], tokenizer.train
  monkeypatch.setattr(
    tokenizer,
    "train",
    lambda texts, size: seen.extend(texts) or train(texts, size),
  )
  scale = config_subwords.Scale("tiny", pieces=288, length=32, align=8)
  subwords.prepare(source, scale, tmp_path / "out")
  subwords.prepare(source, scale, tmp_path / "out")  # nothing is left to do
  assert sorted(text.split()[1] for text in seen) == [
    "Train_A_1900",
    "Train_B_1901",
    "train",
  ]
  sizes = subwords.sizes(scale, tmp_path / "out")
  text = "wikitext2 test says äh : six seven \n " * 40
  assert sizes["wikitext2"].words == 7 * 40
  assert sizes["wikitext2"].bytes == len(text.encode()) == len(text) + 40
  words = tokenizer.load(tmp_path / "out" / tokenizer.MODEL)
  # The first token is not predicted, the end token is.
  assert sizes["wikitext2"].tokens == len(words.encode(text))
  config = config_lib.DataConfig(
    kind="records",
    path=",".join(str(tmp_path / "out" / name) for name in sizes),
    sequence_length=32,
  )
  sources = records.load(config, 288)
  test = sources["test"]
  weights = sum(float(test[i]["weights"].sum()) for i in range(len(test)))
  assert weights == sizes["wikitext2"].tokens
  manifest = records.read_manifest(epath.Path(tmp_path / "out/novels/train"))
  assert manifest.counts["documents"] == 2
