"""Raw documents -> packed ArrayRecord shards: parallel, resumable, the same
for any number of workers.

Each part of the inputs (`documents.py`) becomes shards of its own, written to a
temporary file and then renamed; a small JSON file of counts marks the part as
done.  A second call prepares the parts that are missing.  The manifests are
written last.
"""

import collections
import concurrent.futures
import concurrent.futures.process
import dataclasses
import hashlib
import importlib
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from hope_jax.config import ConfigError, Json
from hope_jax.data import documents, packing, records
from hope_jax.data import tokenizer as tokenizer_lib
from hope_jax.data import workers as workers_lib
from hope_jax.runs import files

SPLITS = ("train", "valid", "test")
PARTS, PLAN = "parts", "plan.json"
TOKENIZER_BYTES = 1 << 28  # of text, about, that a tokenizer is trained on


@dataclasses.dataclass(frozen=True)
class Options:
  """What the content of prepared data depends on, besides its inputs.

  Attributes:
    length: places per example.
    align: documents begin at multiples of it; the longest memory chunk.
    split: the split of all documents, unless `holdout` is given.
    holdout: shares of documents for valid and test; the rest is train.
      Equal texts go to the same split.
    long: documents of at least this many tokens form the group `long`, the
      others `short`; 0: one group, `all`.
    text_field, prompt_field: names of a record's fields; the prompt's tokens
      get weight 0.
    parts: number of parts, from the first one, of about `part_bytes` each; 0:
      all parts.
    seed: seed of the order of documents inside a part.
  """

  length: int = 4096
  align: int = 64
  split: str = "train"
  holdout: tuple[float, ...] = ()
  long: int = 0
  text_field: str = "text"
  prompt_field: str | None = None
  part_bytes: int = documents.PART_BYTES
  parts: int = 0
  seed: int = 0

  def check(self) -> None:
    """Raises `ConfigError` for impossible options."""
    if self.length < 1 or self.align < 1 or self.length % self.align:
      raise ConfigError(
        f"--length={self.length} must be a multiple of --align={self.align}"
      )
    if self.split not in SPLITS:
      raise ConfigError(f"--split={self.split} is none of {', '.join(SPLITS)}")
    shares = self.holdout
    if shares and (
      len(shares) != 2 or min(shares) < 0 or not 0 < sum(shares) < 1
    ):
      raise ConfigError(
        f"--holdout={','.join(map(str, shares))} must be two shares, valid and"
        " test, with a sum below 1"
      )
    if min(self.long, self.parts) < 0 or self.part_bytes < 1:
      raise ConfigError(
        f"--long={self.long} and --parts={self.parts} must not be negative,"
        f" --part_bytes={self.part_bytes} must be positive"
      )


def split_of(text: str, options: Options) -> str:
  """The split of a document, by its content alone."""
  if not options.holdout:
    return options.split
  digest = hashlib.sha256(text.encode()).digest()
  place = int.from_bytes(digest[:8], "big") / 2**64
  valid, test = options.holdout
  return (
    "valid" if place < valid else "test" if place < valid + test else "train"
  )


def tokenize(
  text: documents.Text, tokenizer: tokenizer_lib.Tokenizer
) -> packing.Document:
  """Prompt (weight 0), text and the end token (weight 1)."""
  prompt = tokenizer.encode(text.prompt) if text.prompt else []
  tokens = [np.asarray(prompt, np.int32), tokenizer.encode(text.text)]
  if tokenizer.eos is not None:
    tokens.append(np.asarray([tokenizer.eos]))
  joined = np.concatenate(tokens)
  weights = np.ones(len(joined), np.float16)
  weights[: len(prompt)] = 0
  dtype = token_dtype(tokenizer.vocab_size)
  return packing.Document(joined.astype(dtype), weights)


def token_dtype(vocab_size: int) -> np.dtype:
  """The smallest unsigned dtype that holds every token."""
  return np.dtype(np.min_scalar_type(vocab_size - 1))


# --------------------------------------------------------------- one part


def _run_part(
  index: int,
  part: documents.Part,
  tokenizer: tokenizer_lib.Tokenizer,
  options: Options,
  output: str,
) -> int:
  """Writes one part's shards, then its counts; returns its size in bytes."""
  groups = collections.defaultdict(list)
  fields = documents.Fields(options.text_field, options.prompt_field)
  for number, text in enumerate(documents.read(part, fields)):
    try:
      document = tokenize(text, tokenizer)
    except ConfigError as error:
      place = f"from {part.start} on" if part.start else "in order"
      raise ConfigError(
        f"{part.path}, document {number} {place}: {error}"
      ) from error
    group = "all"
    if options.long:
      is_long = len(document.tokens) >= options.long
      group = "long" if is_long else "short"
    groups[split_of(text.prompt + text.text, options), group].append(document)
  shards = []
  rng = np.random.default_rng([options.seed, index])
  for (split, group), found in sorted(groups.items()):
    order = rng.permutation(len(found))
    shuffled = (found[i] for i in order)
    file = f"{group}-{index:05d}.arrayrecord"
    path = epath.Path(output) / split / file
    dtype = token_dtype(tokenizer.vocab_size)
    packed = packing.pack(shuffled, options.length, options.align, dtype)
    counts = _write_shard(path, packed)
    if counts["examples"]:
      counts["documents"] = sum(len(d.tokens) > 1 for d in found)
      shards.append({"split": split, "group": group, "file": file, **counts})
  done = epath.Path(output) / PARTS / f"{index:05d}.json"
  files.write_text(done, json.dumps(shards))
  return part.bytes


def _shards(folder: epath.Path, index: int) -> list[Json] | None:
  """The shards of a part; None if it is not prepared yet, or was damaged since
  (a crash of the machine may lose what was not yet on its disk)."""
  try:
    shards = json.loads((folder / PARTS / f"{index:05d}.json").read_text())
    for shard in shards:
      path = folder / shard["split"] / shard["file"]
      if path.stat().length != shard["bytes"]:
        return None
  except (OSError, ValueError):
    return None
  return shards


def _write_shard(path: epath.Path, examples: Iterable[packing.Example]) -> Json:
  """Writes a shard atomically, or none if it is empty; returns its counts."""
  array_record: Any = importlib.import_module(
    "array_record.python.array_record_module"
  )
  counts = {"examples": 0, "tokens": 0, "places": 0}
  scratch = None if files.is_remote(path) else path.parent.parent / PARTS
  with files.writing(path, scratch) as temporary:
    writer = array_record.ArrayRecordWriter(
      str(temporary), records.WRITER_OPTIONS
    )
    for example in examples:
      writer.write(records.encode(example))
      counts["examples"] += 1
      counts["tokens"] += int(np.count_nonzero(example["weights"]))
      counts["places"] += len(example["tokens"])
    writer.close()
    if not counts["examples"]:
      temporary.unlink()
      return counts
    with temporary.open("rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = temporary.stat().st_size
  return {**counts, "bytes": size, "sha256": digest}


# ------------------------------------------------------------------ all


def prepare(
  inputs: list[str],
  output: str,
  tokenizer: str,
  options: Options,
  *,
  licence: str = "",
  workers: int = 0,
  progress: Any = None,
) -> dict[str, records.Manifest]:
  """Prepares `inputs` into folder `output`; returns the splits' manifests.

  Args:
    tokenizer: `bytes`, a tokenizer's file, or `sentencepiece:VOCAB_SIZE` to
      train one on the inputs first.
    workers: processes; 0: one per core.
    progress: called with (parts done, parts, bytes done) after every part.
  """
  options.check()
  paths = documents.find(inputs)
  fields = documents.Fields(options.text_field, options.prompt_field)
  parts = documents.parts(paths, options.part_bytes, fields)
  parts = parts[: options.parts or None]
  folder = files.reach(output)
  plan = {
    "options": dataclasses.asdict(options),
    "tokenizer": tokenizer,
    "licence": licence,
    "parts": [part._asdict() for part in parts],
    "changed": {path: documents.changed(path) for path in paths},
  }
  _claim(folder, plan, options)
  tokenizer_ = _tokenizer(folder, tokenizer, parts, options)
  todo = [
    (index, part)
    for index, part in enumerate(parts)
    if _shards(folder, index) is None
  ]
  done_bytes = sum(p.bytes for p in parts) - sum(p.bytes for _, p in todo)
  count = len(parts) - len(todo)
  for size in _run(todo, tokenizer_, options, output, workers):
    count, done_bytes = count + 1, done_bytes + size
    if progress:
      progress(count, len(parts), done_bytes)
  return _finish(folder, plan, parts, tokenizer_, options)


def _claim(folder: epath.Path, plan: Json, options: Options) -> None:
  """Claims `folder` for this preparation, or checks that it is claimed."""
  path, text = folder / PARTS / PLAN, json.dumps(plan)
  if path.exists():
    if path.read_text() != text:
      raise ConfigError(
        f"{folder} holds a preparation of other inputs or options: finish it"
        " with the same command and unchanged files, or choose another --output"
      )
    return
  targets = ("train", "valid", "test") if options.holdout else (options.split,)
  for split in targets:
    if (folder / split / records.MANIFEST).exists():
      raise ConfigError(
        f"{folder / split} is prepared already: choose another --output"
      )
  files.write_text(path, text)


def _tokenizer(
  folder: epath.Path,
  name: str,
  parts: list[documents.Part],
  options: Options,
) -> tokenizer_lib.Tokenizer:
  """The tokenizer, trained if asked for; its files are saved in `folder`."""
  if name == tokenizer_lib.BYTES:
    return tokenizer_lib.load(name)
  path = folder / tokenizer_lib.MODEL
  kind, _, size = name.partition(":")
  if kind == "sentencepiece":
    if not size.isdigit():
      raise ConfigError(
        f"--tokenizer={name}: give the size, as in sentencepiece:32000"
      )
    if not path.exists():
      fields = documents.Fields(options.text_field, options.prompt_field)
      texts = (
        text.prompt + text.text
        for part in _sample(parts)
        for text in documents.read(part, fields)
      )
      model = tokenizer_lib.train(texts, int(size), options.seed)
      with files.writing(path) as beside:
        beside.write_bytes(model)
    loaded = tokenizer_lib.load(path)
    if loaded.vocab_size != int(size):
      raise ConfigError(
        f"{folder} holds a tokenizer of {loaded.vocab_size} pieces, not of"
        f" --tokenizer={name}: choose another --output"
      )
    return loaded
  loaded = tokenizer_lib.load(name)
  for file, content in loaded.files.items():
    if (folder / file).exists() and (folder / file).read_bytes() != content:
      raise ConfigError(
        f"{folder} holds another tokenizer than --tokenizer={name}: choose"
        " another --output"
      )
  tokenizer_lib.save(loaded, folder)
  return tokenizer_lib.load(folder / next(iter(loaded.files)))


def _sample(parts: list[documents.Part]) -> list[documents.Part]:
  """All parts, or evenly spaced ones with about `TOKENIZER_BYTES` of text:
  training takes some 30 bytes of memory per byte of text."""
  total = sum(part.bytes for part in parts)
  step = max(1, -(-total // TOKENIZER_BYTES))
  return parts[::step]


def _run(
  todo: list[tuple[int, documents.Part]],
  tokenizer: tokenizer_lib.Tokenizer,
  options: Options,
  output: str,
  workers: int,
) -> Iterator[int]:
  workers = min(workers or os.cpu_count() or 1, len(todo))
  if workers <= 1:
    for index, part in todo:
      yield _run_part(index, part, tokenizer, options, output)
    return
  context = multiprocessing.get_context("spawn")
  pool = concurrent.futures.ProcessPoolExecutor(
    workers, context, workers_lib.follow_parent
  )
  try:
    with workers_lib.starting():
      futures = [
        pool.submit(_run_part, index, part, tokenizer, options, output)
        for index, part in todo
      ]
    for future in concurrent.futures.as_completed(futures):
      yield future.result()
  except concurrent.futures.process.BrokenProcessPool as error:
    raise ConfigError(
      "a process that prepared a part was killed, perhaps for its memory: run"
      f" the same command again, with fewer --workers ({workers})"
    ) from error
  finally:  # after an error, running parts are not waited for
    pool.shutdown(wait=False, cancel_futures=True)


def _finish(
  folder: epath.Path,
  plan: Json,
  parts: list[documents.Part],
  tokenizer: tokenizer_lib.Tokenizer,
  options: Options,
) -> dict[str, records.Manifest]:
  """Writes the splits' manifests and removes what only resuming needs."""
  by_split = collections.defaultdict(list)
  for index in range(len(parts)):
    for shard in _shards(folder, index) or ():
      by_split[shard.pop("split")].append(shard)
  if not by_split:
    raise ConfigError(
      "no document has two tokens: there is nothing to prepare in "
      + ", ".join(dict.fromkeys(part.path for part in parts))
    )
  sizes = collections.Counter()
  for part in parts:
    sizes[part.path] += part.bytes
  manifests = {}
  for split, shards in sorted(by_split.items()):
    names = ("documents", "tokens", "examples", "places")
    counts = {name: sum(shard[name] for shard in shards) for name in names}
    kept = ("file", "group", "examples", "bytes", "sha256")
    manifests[split] = records.Manifest(
      split=split,
      length=options.length,
      align=options.align,
      token_dtype=token_dtype(tokenizer.vocab_size).name,
      tokenizer=records.TokenizerOf(
        name=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        eos=tokenizer.eos,
        sha256=tokenizer.sha256,
      ),
      counts=counts,
      options=plan["options"],
      sources=[{"path": path, "bytes": size} for path, size in sizes.items()],
      licence=plan["licence"],
      shards=[
        records.Shard(**{name: shard[name] for name in kept})
        for shard in shards
      ],
    )
    path = folder / split / records.MANIFEST
    files.write_text(path, records.to_json(manifests[split]))
  (folder / PARTS).rmtree()
  return manifests
