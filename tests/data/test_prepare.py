"""Preparation of real text files, from the command's function to batches."""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib

import numpy as np
import pytest

from hope_jax.config import (
  Config,
  ConfigError,
  DataConfig,
  MemoryConfig,
  ModelConfig,
  RecordsConfig,
)
from hope_jax.data import documents, pipeline, prepare, records, text
from hope_jax.data.prepare import Options
from hope_jax.data.records import Manifest

SHAKESPEARE = text.REPOSITORY / DataConfig().path
SPEECHES = list(dict.fromkeys(SHAKESPEARE.read_text().split("\n\n")))[:400]
TITANS = MemoryConfig(adaptive=())
SMALL = Options(length=64, align=16, part_bytes=8_000)


@pytest.fixture
def source(tmp_path):
  lines = [json.dumps({"text": s, "role": s.split(":")[0]}) for s in SPEECHES]
  path = tmp_path / "speeches.jsonl"
  path.write_text("\n".join(lines) + "\n\n")
  return path


def run(source, output, options=SMALL, tokenizer="bytes", **kwargs):
  return prepare.prepare(
    [str(source)], str(output), tokenizer, options, workers=1, **kwargs
  )


def content(folder):
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(pathlib.Path(folder).rglob("*"))
    if path.is_file()
  }


def read_back(folder, split="train"):
  """Every document that is in a split, as bytes."""
  manifest = records.read_manifest(records.epath.Path(folder) / split)
  found = []
  for shard in manifest.shards:
    part = Manifest(**{**vars(manifest), "shards": [shard]})
    examples = records.Examples(
      records.epath.Path(folder) / split, part, shard.group
    )
    for i in range(len(examples)):
      example, before = examples[i], 0
      for t in range(manifest.length):
        segment = example["segments"][t]
        if segment != before:
          found.append([example["tokens"][t]])
          before = segment
        if example["weights"][t]:
          found[-1].append(example["targets"][t])
  return [bytes(np.asarray(tokens, np.uint8)).decode() for tokens in found]


def test_every_document_comes_back(source, tmp_path):
  manifests = run(source, tmp_path / "out")
  assert sorted(read_back(tmp_path / "out")) == sorted(SPEECHES)
  manifest = manifests["train"]
  assert manifest.counts["documents"] == len(SPEECHES)
  assert manifest.counts["tokens"] == sum(len(s.encode()) - 1 for s in SPEECHES)
  assert len(manifest.shards) > 3
  assert not (tmp_path / "out" / "parts").exists()


def test_any_number_of_workers_gives_the_same_bytes(source, tmp_path):
  run(source, tmp_path / "one")
  prepare.prepare(
    [str(source)], str(tmp_path / "two"), "bytes", SMALL, workers=2
  )
  assert content(tmp_path / "one") == content(tmp_path / "two")


def test_interrupted_preparation_goes_on(source, tmp_path):
  run(source, tmp_path / "whole")

  class Stop(Exception):
    pass

  def stop(count, total, done):
    if count == 2:
      raise Stop

  with pytest.raises(Stop):
    run(source, tmp_path / "cut", progress=stop)
  assert not (tmp_path / "cut" / "train" / "manifest.json").exists()
  counts = []
  run(source, tmp_path / "cut", progress=lambda c, *_: counts.append(c))
  assert counts[0] == 3
  assert content(tmp_path / "whole") == content(tmp_path / "cut")


def test_interrupted_preparation_refuses_other_options(source, tmp_path):
  def stop(count, total, done):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run(source, tmp_path / "out", progress=stop)
  before = content(tmp_path / "out")
  with pytest.raises(ConfigError, match="other inputs or options: finish it"):
    run(source, tmp_path / "out", Options(length=32, align=16))
  assert content(tmp_path / "out") == before


def interrupt(source, output, parts=2):
  """Prepares so many parts."""

  def stop(count, total, done):
    if count == parts:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run(source, output, progress=stop)


def test_parts_lost_after_an_interruption_are_made_again(source, tmp_path):
  run(source, tmp_path / "whole")
  interrupt(source, tmp_path / "cut", 3)
  (tmp_path / "cut" / "parts" / "00000.json").write_text("")
  shards = sorted((tmp_path / "cut" / "train").iterdir())
  shards[1].write_bytes(shards[1].read_bytes()[:-9])
  shards[2].unlink()
  counts = []
  run(source, tmp_path / "cut", progress=lambda c, *_: counts.append(c))
  assert counts[0] == 1
  assert content(tmp_path / "whole") == content(tmp_path / "cut")


def test_interrupted_preparation_refuses_changed_files(source, tmp_path):
  interrupt(source, tmp_path / "out")
  held = source.read_text()
  source.write_text(held.replace("First", "Other"))
  os.utime(source, (0, 0))
  with pytest.raises(ConfigError, match="same command and unchanged files"):
    run(source, tmp_path / "out")


def test_parts_may_be_the_first_only(source, tmp_path):
  options = Options(length=64, align=16, part_bytes=8_000, parts=2)
  manifest = run(source, tmp_path / "out", options)["train"]
  assert len(manifest.shards) == 2
  found = read_back(tmp_path / "out")
  assert sorted(found) == sorted(SPEECHES[: len(found)])


def test_tokenizer_is_trained_on_a_part_of_much_text(monkeypatch):
  parts = [documents.Part("x", "jsonl", i, i + 1, 1000) for i in range(10)]
  assert prepare._sample(parts) == parts
  monkeypatch.setattr(prepare, "TOKENIZER_BYTES", 3400)
  assert prepare._sample(parts) == parts[::3]


def test_tokenizer_of_another_size_is_refused(source, tmp_path):
  run(source, tmp_path / "out", tokenizer="sentencepiece:400")
  options = Options(length=64, align=16, split="valid")
  with pytest.raises(ConfigError, match="holds a tokenizer of 400 pieces, not"):
    run(source, tmp_path / "out", options, tokenizer="sentencepiece:350")


def test_place_of_a_document_without_tokens_is_named(source, tmp_path):
  (tmp_path / "x.jsonl").write_text('{"text": "ab"}\n{"text": "a\\ud800"}\n')
  with pytest.raises(ConfigError, match="x.jsonl, document 1 in order: the te"):
    run(tmp_path / "x.jsonl", tmp_path / "out")


@pytest.mark.parametrize(
  ("column", "message"),
  [
    ({"body": ["a"]}, "has no column 'text'; it has body"),
    ({"text": [1]}, "column 'text' is int64, not text"),
    ({"text": [b"ab"]}, "column 'text' is binary, not text"),
    ({"text": ["ab", None]}, "'text' has 1 rows without a value in row group"),
  ],
)
def test_unusable_columns_are_found_before_anything_is_read(
  column, message, tmp_path
):
  import pyarrow
  from pyarrow import parquet

  good = pyarrow.table({"text": ["ab", "cd"]})
  parquet.write_table(good, tmp_path / "a.parquet")
  parquet.write_table(pyarrow.table(column), tmp_path / "b.parquet")
  with pytest.raises(ConfigError, match=message):
    run(tmp_path / "*.parquet", tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_columns_of_text_in_all_their_kinds(tmp_path):
  import pyarrow
  from pyarrow import parquet

  for kind in (
    pyarrow.string(),
    pyarrow.large_string(),
    pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
  ):
    column = pyarrow.array(["ab", "ab"], pyarrow.string()).cast(kind)
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    (part,) = documents.parts([str(tmp_path / "x.parquet")])
    assert [d.text for d in documents.read(part, documents.FIELDS)] == [
      "ab",
      "ab",
    ]


@pytest.mark.parametrize("part_bytes", [12, 16, 18, 24, 100])
def test_parts_of_jsonl_hold_every_line_once(part_bytes, tmp_path):
  lines = [f'{{"text": "{i}"}}' for i in range(10)]  # 12 bytes and a line end
  (tmp_path / "x.jsonl").write_text("".join(f"{line}\n" for line in lines))
  parts = documents.parts([str(tmp_path / "x.jsonl")], part_bytes)
  read = [d.text for p in parts for d in documents.read(p, documents.Fields())]
  assert read == [str(i) for i in range(10)]


def test_formats_hold_the_same_documents(source, tmp_path):
  import pyarrow
  from pyarrow import parquet

  folder = tmp_path / "texts"
  folder.mkdir()
  for i, speech in enumerate(SPEECHES):
    (folder / f"{i:04d}.txt").write_text(speech)
  table = pyarrow.table({"text": SPEECHES, "id": list(range(len(SPEECHES)))})
  parquet.write_table(table, tmp_path / "s.parquet", row_group_size=64)
  with gzip.open(tmp_path / "s.jsonl.gz", "wb") as file:
    file.write(source.read_bytes())
  fields = documents.Fields()
  for name in ("texts", "s.parquet", "s.jsonl.gz", "*.jsonl"):
    paths = documents.find([str(tmp_path / name)])
    read = [
      document.text
      for part in documents.parts(paths, 5_000)
      for document in documents.read(part, fields)
    ]
    assert read == SPEECHES, name


def test_tfds_source(monkeypatch):
  """A data set that the real library wrote: three lines, as array_record."""
  monkeypatch.setenv(
    "TFDS_DATA_DIR", str(pathlib.Path(__file__).parent / "tfds")
  )
  fields = documents.Fields("text", "role")
  name = "tfds:speeches:train"
  read = [d for p in documents.parts([name]) for d in documents.read(p, fields)]
  assert [d.text for d in read] == [
    "To be, or not to be.",
    "That is the question.",
    "Ay, there’s the rub.",
  ]
  assert {d.prompt for d in read} == {"Hamlet"}
  with pytest.raises(ConfigError, match="no text in field 'body'"):
    list(documents.read(documents.parts([name])[0], documents.Fields("body")))
  with pytest.raises(ConfigError, match="cannot open tfds:speeches:test"):
    documents.parts(["tfds:speeches:test"])
  with pytest.raises(ConfigError, match="cannot open tfds:nothing:train"):
    documents.parts(["tfds:nothing:train"])


def test_holdout_splits_by_content(source, tmp_path):
  options = Options(length=64, align=16, holdout=(0.1, 0.2))
  run(source, tmp_path / "out", options)
  parts = {s: set(read_back(tmp_path / "out", s)) for s in prepare.SPLITS}
  assert set.union(*parts.values()) == set(SPEECHES)
  assert sum(map(len, parts.values())) == len(set(SPEECHES))
  assert 0.05 < len(parts["valid"]) / len(SPEECHES) < 0.15
  assert 0.12 < len(parts["test"]) / len(SPEECHES) < 0.28


def test_prompts_are_read_but_not_learned(source, tmp_path):
  options = Options(length=64, align=16, prompt_field="role")
  manifest = run(source, tmp_path / "out", options)["train"]
  words = sum(len(s.encode()) for s in SPEECHES)
  assert manifest.counts["tokens"] == words


def config(folder, **fields):
  names = {f.name for f in dataclasses.fields(RecordsConfig)}
  own = {name: fields.pop(name) for name in names & fields.keys()}
  data = {"kind": "records", "path": str(folder), "sequence_length": 64}
  return Config(
    model=ModelConfig(sequence_layer="titans", memory=TITANS),
    data=DataConfig(
      **{**data, "batch_size": 4, **fields}, records=RecordsConfig(**own)
    ),
  )


@pytest.fixture
def prepared(source, tmp_path):
  options = Options(length=64, align=64, holdout=(0.1, 0.1), long=200)
  run(source, tmp_path / "data", options)
  return tmp_path / "data"


def test_training_reads_every_example_once_an_epoch(prepared):
  train = pipeline.load(config(prepared))["train"]
  in_order = pipeline.load(config(prepared))["in_order"]
  count = len(in_order)
  key = lambda example: example["targets"].tobytes()
  # Two groups, mixed by size: each is read in its own epochs.
  seen = {key(train[i]) for i in range(2 * count)}
  assert seen == {key(in_order[i]) for i in range(count)}


def test_seed_sets_the_order(prepared):
  order = lambda seed: [
    pipeline.load(config(prepared, seed=seed))["train"][i]["tokens"].tobytes()
    for i in range(8)
  ]
  assert order(0) == order(0) != order(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_the_step_alone(prepared, workers):
  source = pipeline.load(config(prepared))["train"]
  batches = pipeline.TrainBatches(source, 4, (0, 4), 12)
  ahead = list(pipeline.prefetch(batches, 5, workers))
  assert len(ahead) == 7
  for step, batch in enumerate(ahead, 5):
    for name, value in batches[step].items():
      np.testing.assert_array_equal(batch[name], value)


def test_long_share_and_weights(prepared, source, tmp_path):
  folder = records.epath.Path(prepared) / "train"
  manifest = records.read_manifest(folder)
  long = records.Examples(folder, manifest, "long")
  long = {long[i]["targets"].tobytes() for i in range(len(long))}
  train = pipeline.load(config(prepared, long_share=0.75))["train"]
  share = np.mean([train[i]["targets"].tobytes() in long for i in range(200)])
  assert 0.74 < share < 0.76
  run(source, tmp_path / "other", Options(length=64, align=64, seed=3))
  both = f"{prepared},{tmp_path / 'other'}"
  train = pipeline.load(config(both, weights=(1.0, 3.0)))["train"]
  assert len({train[i]["tokens"].tobytes() for i in range(100)}) > 50


def test_carried_rows_go_on(prepared):
  """Row b of a step is followed by row b of the next one."""
  cfg = config(prepared)
  train = pipeline.dataclasses.replace(cfg.train, carry_state=True)
  cfg = pipeline.dataclasses.replace(cfg, train=train)
  sources = pipeline.load(cfg)
  total = len(sources["in_order"])
  count = total // 4
  whole = [sources["in_order"][i]["targets"].tobytes() for i in range(total)]
  starts = []
  for row in range(4):
    rows = [sources["train"][step * 4 + row] for step in range(count + 1)]
    read = [example["targets"].tobytes() for example in rows[:count]]
    twice = whole + whole
    starts += [i for i in range(total) if twice[i : i + count] == read]
    assert len(starts) == row + 1
    # A lane's first example goes on from nothing.
    assert rows[0]["segments"].min() > 0 and rows[count]["segments"].min() > 0
  assert (np.diff(starts) % total == count).all()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"sequence_length": 32}, "holds examples of 64 tokens: set data.sequence"),
    ({"path": ""}, "data.path is empty"),
    ({"path": "nowhere"}, "is not prepared data"),
    ({"weights": (1.0, 2.0)}, "2 weights for 1 folders"),
  ],
)
def test_unusable_config_is_one_clear_line(prepared, fields, message):
  with pytest.raises(ConfigError, match=message):
    pipeline.load(config(prepared, **fields))


def test_shards_that_do_not_match_their_manifest(prepared):
  shard = next((prepared / "train").glob("*.arrayrecord"))
  good = shard.read_bytes()
  shard.write_bytes(good[:-10])
  with pytest.raises(ConfigError, match="its manifest says .*: copy it again"):
    pipeline.load(config(prepared))
  shard.unlink()
  with pytest.raises(ConfigError, match="is missing: copy it again"):
    pipeline.load(config(prepared))
  manifest = prepared / "train" / "manifest.json"
  manifest.write_text("{}")
  with pytest.raises(ConfigError, match="is not a manifest"):
    pipeline.load(config(prepared))


def test_misaligned_documents_are_refused(source, tmp_path):
  run(source, tmp_path / "out", Options(length=64, align=16))
  with pytest.raises(ConfigError, match="multiples of 16, not .* length 64"):
    pipeline.load(config(tmp_path / "out"))


def test_wrong_tokenizer_is_refused(source, tmp_path):
  run(source, tmp_path / "a", tokenizer="sentencepiece:400")
  model = tmp_path / "a" / "tokenizer.model"
  data = DataConfig(kind="records", path=str(tmp_path / "a"))
  assert records.load_tokenizer(data).vocab_size == 400
  small = ModelConfig(sequence_layer="transformer")
  cfg = Config(model=small, data=config(tmp_path / "a").data)
  with pytest.raises(ConfigError, match="set it to 400"):
    pipeline.load(cfg)
  other = prepare.tokenizer_lib.train(SPEECHES, 350)
  model.write_bytes(other)
  with pytest.raises(ConfigError, match="not the tokenizer that made"):
    records.load_tokenizer(data)


BAD = {
  "bad.jsonl": (b'{"text": "a"}\n{"text": \n', "byte 14: not JSON"),
  "list.jsonl": (b"[1, 2]\n", "byte 0: not an object"),
  "null.jsonl": (b'{"text": null}\n', "field 'text' is null, not text"),
  "number.jsonl": (b'{"text": 3}\n', "field 'text' is a int, not text"),
  "field.jsonl": (b'{"txt": "a"}\n', "no text in field 'text'; it has txt"),
  "latin.jsonl": (b'{"text": "\xe9"}\n', "byte 10 is 0xe9"),
  "latin.txt": (b"caf\xe9", "byte 3 is 0xe9"),
  "empty.txt": (b"", "is empty"),
  "short.txt": (b"a", "no document has two tokens"),
  "not.parquet": (b"PAR1 no", "is not a parquet file"),
  "cut.jsonl.gz": (gzip.compress(b'{"text": "ab"}\n')[:-4], "not a whole gzip"),
  "odd.csv": (b"a,b", "none of .txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name, tmp_path):
  data, message = BAD[name]
  (tmp_path / name).write_bytes(data)
  with pytest.raises(ConfigError, match=message):
    run(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (Options(length=60, align=16), "multiple of --align=16"),
    (Options(split="dev"), "--split=dev is none of"),
    (Options(holdout=(0.5,)), "two shares"),
    (Options(holdout=(0.9, 0.2)), "two shares"),
  ],
)
def test_bad_options_are_one_clear_line(options, message, source, tmp_path):
  with pytest.raises(ConfigError, match=message):
    run(source, tmp_path / "out", options)
  assert not (tmp_path / "out").exists()


def test_other_preparation_is_not_overwritten(source, tmp_path):
  run(source, tmp_path / "out")
  before = content(tmp_path / "out")
  with pytest.raises(ConfigError, match="is prepared already"):
    run(source, tmp_path / "out")
  assert content(tmp_path / "out") == before


def test_missing_and_repeated_inputs(source, tmp_path):
  with pytest.raises(ConfigError, match="no input .*none.txt"):
    documents.find([str(tmp_path / "none.txt")])
  with pytest.raises(ConfigError, match="named twice"):
    documents.find([str(source), str(source)])


def test_data_in_a_bucket_are_read_through_the_cache(
  source, prepared, bucket, tmp_path
):
  speeches = bucket / "speeches.jsonl"
  speeches.write_bytes(source.read_bytes())
  options = Options(length=64, align=64, holdout=(0.1, 0.1), long=200)
  run(speeches, bucket / "data", options)
  here, there = (
    pipeline.load(config(folder))["in_order"]
    for folder in (prepared, bucket / "data")
  )
  assert len(here) == len(there)
  for i in range(len(here)):
    np.testing.assert_array_equal(here[i]["tokens"], there[i]["tokens"])
  copy = next((tmp_path / "cache").rglob("*.arrayrecord"))
  before = copy.stat().st_mtime_ns
  assert pipeline.load(config(bucket / "data"))["in_order"][0]
  assert copy.stat().st_mtime_ns == before
