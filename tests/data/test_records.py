"""What prepared data promise, from documents to records."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath

from hope_jax.config import ConfigError, DataConfig
from hope_jax.data import documents, prepare, records, tokenizer
from hope_jax.data.prepare import Options

TEXTS = [f"{i} " + "so it goes " * (1 + i % 7) for i in range(60)]


def make(folder, texts=TEXTS, **options):
  source = folder.parent / f"{folder.name}.jsonl"
  source.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
  given = Options(
    **{"length": 32, "align": 8, "holdout": (0.2, 0.2), **options}
  )
  return prepare.prepare([str(source)], str(folder), "bytes", given, workers=1)


def load(*folders, **fields):
  path = ",".join(map(str, folders))
  config = DataConfig(kind="records", path=path, sequence_length=32, **fields)
  return records.load(config, 256)


def tokens_of(source):
  return [source[i]["tokens"].tobytes() for i in range(len(source))]


def test_end_token_is_learned_and_a_prompt_is_not(tmp_path):
  model = tokenizer.train(TEXTS, 277)
  words = tokenizer.SentencePiece(model, "toy")
  found = prepare.tokenize(documents.Text("so it", "goes"), words)
  read = len(words.encode("so it"))
  assert found.tokens[-1] == words.eos
  np.testing.assert_array_equal(found.weights[:read], 0)
  np.testing.assert_array_equal(found.weights[read:], 1)
  assert len(found.tokens) == read + len(words.encode("goes")) + 1


def test_long_documents_have_at_least_so_many_tokens(tmp_path):
  texts = ["x" * 19, "y" * 20, "z" * 21]
  manifest = make(tmp_path / "d", texts, long=20, holdout=())["train"]
  by_group = {}
  for shard in manifest.shards:
    here = epath.Path(tmp_path / "d" / "train")
    only = dataclasses.replace(manifest, shards=[shard])
    examples = records.Examples(here, only, shard.group)
    read = np.frombuffer(b"".join(tokens_of(examples)), np.int32)
    by_group[shard.group] = {chr(token) for token in set(read) - {0}}
  assert by_group == {"short": {"x"}, "long": {"y", "z"}}


def test_seed_shuffles_the_documents_of_a_part(tmp_path):
  for seed in (0, 1):
    make(tmp_path / str(seed), holdout=(), seed=seed)
  firsts = []
  for seed in (0, 1):
    folder = epath.Path(tmp_path / str(seed) / "train")
    manifest = records.read_manifest(folder)
    firsts.append(tokens_of(records.Examples(folder, manifest, "all"))[0])
  assert firsts[0] != firsts[1]
  assert not firsts[0].startswith(np.frombuffer(b"0 so", np.uint8).astype("i4"))


def test_split_depends_on_prompt_and_text():
  """Equal texts go together; the same question with another answer need not."""
  options = Options(holdout=(0.3, 0.3))
  assert len({prepare.split_of("a", options) for _ in range(9)}) == 1
  found = {prepare.split_of(f"{i}", options) for i in range(40)}
  assert found == {"train", "valid", "test"}


def test_prompts_decide_about_the_split(tmp_path):
  lines = [{"text": "yes", "ask": f"question {i}"} for i in range(40)]
  source = tmp_path / "x.jsonl"
  source.write_text("".join(json.dumps(line) + "\n" for line in lines))
  options = Options(length=32, align=8, holdout=(0.3, 0.3), prompt_field="ask")
  made = prepare.prepare(
    [str(source)], str(tmp_path / "d"), "bytes", options, workers=1
  )
  assert set(made) == {"train", "valid", "test"}


def test_valid_and_test_are_the_first_folders(tmp_path):
  make(tmp_path / "a")
  make(tmp_path / "b", [text.upper() for text in TEXTS])
  alone, both = load(tmp_path / "a"), load(tmp_path / "a", tmp_path / "b")
  for split in ("valid", "test"):
    assert tokens_of(both[split]) == tokens_of(alone[split])
  total = len(alone["in_order"]) + len(load(tmp_path / "b")["in_order"])
  assert len(both["in_order"]) == total


def test_folders_of_two_tokenizers_are_not_mixed(tmp_path):
  make(tmp_path / "a")
  make(tmp_path / "b")
  path = tmp_path / "b" / "train" / "manifest.json"
  manifest = json.loads(path.read_text())
  manifest["tokenizer"]["sha256"] = "0" * 64
  path.write_text(json.dumps(manifest))
  with pytest.raises(ConfigError, match="b was made by another tokenizer"):
    load(tmp_path / "a", tmp_path / "b")


def test_fingerprint_knows_every_split(tmp_path):
  make(tmp_path / "a")
  config = DataConfig(kind="records", path=str(tmp_path / "a"))
  seen = {records.fingerprint(config)["content"]}
  for split in ("train", "valid", "test"):
    path = tmp_path / "a" / split / "manifest.json"
    path.write_text(path.read_text().replace('"licence": ""', '"licence": "x"'))
    seen.add(records.fingerprint(config)["content"])
  assert len(seen) == 4


def test_shards_with_more_examples_than_their_manifest_says(tmp_path):
  make(tmp_path / "a")
  path = tmp_path / "a" / "train" / "manifest.json"
  manifest = json.loads(path.read_text())
  manifest["shards"][0]["examples"] -= 1
  path.write_text(json.dumps(manifest))
  with pytest.raises(ConfigError, match="their manifest says"):
    load(tmp_path / "a")


def test_flipped_bytes_of_records_are_noticed(tmp_path):
  """By the checksums of the format: no byte changes what is read silently."""
  make(tmp_path / "a", holdout=())
  folder = epath.Path(tmp_path / "a" / "train")
  manifest = records.read_manifest(folder)
  shard = folder / manifest.shards[0].file
  good = shard.read_bytes()
  before = tokens_of(records.Examples(folder, manifest, "all"))
  noticed = 0
  for place in range(0, 4000, 97):
    bad = bytearray(good)
    bad[place] ^= 4
    shard.write_bytes(bytes(bad))
    try:
      assert tokens_of(records.Examples(folder, manifest, "all")) == before
    except ConfigError as error:
      assert "is damaged" in str(error)
      noticed += 1
  assert noticed > 10
