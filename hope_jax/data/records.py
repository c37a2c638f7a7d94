"""Prepared data: ArrayRecord shards of packed examples, and their manifest.

A folder holds one folder per split:

  train/manifest.json   what is in it: format, tokenizer, sources, counts
  train/all-00000.arrayrecord ...

A record is the bytes of an example's arrays, one after the other in the
manifest's order.  Paths may be remote (gs://): a shard is copied to a local
cache when it is first opened (HOPE_JAX_CACHE, default ~/.cache/hope_jax).
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from etils import epath

from hope_jax.config import Config, ConfigError, DataConfig, Json, convert
from hope_jax.data import tokenizer
from hope_jax.data.packing import FIELDS, Example
from hope_jax.runs import files

MANIFEST = "manifest.json"
VERSION = 1
TOKEN_DTYPES = ("uint8", "uint16", "uint32")
# Each example, which may have tens of thousands of tokens, is a compressed
# group of its own, so that it can be read alone.
WRITER_OPTIONS = "group_size:1,zstd:3"


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file: its group (`all`; or `short` and `long`), size and content."""

  file: str
  group: str
  examples: int
  bytes: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class TokenizerOf:
  """The tokenizer that made a split (`tokenizer.Tokenizer`)."""

  name: str
  vocab_size: int
  eos: int | None
  sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a split holds.

  Attributes:
    length, align, token_dtype: see `packing.py`.
    counts: documents, tokens (places with a weight), examples, places.
    options: everything else that the content depends on.
    sources: path and size of every input.
  """

  split: str
  length: int
  align: int
  token_dtype: str
  tokenizer: TokenizerOf
  counts: dict[str, int]
  options: Json
  sources: list[Json]
  licence: str
  shards: list[Shard]
  version: int = VERSION

  def __post_init__(self):
    if self.version != VERSION:
      raise ConfigError(f"version {self.version}, this code reads {VERSION}")
    if min(self.length, self.align) < 1:
      raise ConfigError("length and align must be positive")
    if self.token_dtype not in TOKEN_DTYPES:
      raise ConfigError(f"token_dtype {self.token_dtype!r} is not a dtype")

  def fields(self) -> list[tuple[str, np.dtype]]:
    """Names and dtypes of a record's arrays, each of `length` values."""
    token = np.dtype(self.token_dtype)
    return [("tokens", token), ("targets", token), *FIELDS.items()]


def to_json(manifest: Manifest) -> str:
  """The manifest file's content."""
  return json.dumps(dataclasses.asdict(manifest), indent=1) + "\n"


def read_manifest(folder: epath.Path) -> Manifest:
  """The manifest in `folder`; `ConfigError` if it is missing or unusable."""
  path = folder / MANIFEST
  try:
    return convert(Manifest, json.loads(path.read_text()))
  except OSError as error:
    raise ConfigError(
      f"{folder} is not prepared data: it has no {MANIFEST}"
      " (scripts/prepare_data.py makes it)"
    ) from error
  except ValueError as error:  # not JSON, not UTF-8, not a manifest's fields
    raise ConfigError(
      f"{path} is not a manifest ({error}): prepare the data again"
    ) from error


def encode(example: Example) -> bytes:
  """The record of an example, as bytes."""
  return b"".join(
    np.ascontiguousarray(example[name]).tobytes()
    for name in ("tokens", "targets", *FIELDS)
  )


def decode(record: bytes, manifest: Manifest) -> Example:
  """Inverse of `encode`; `ConfigError` for a record of another size."""
  example, start = {}, 0
  for name, dtype in manifest.fields():
    stop = start + manifest.length * dtype.itemsize
    if stop > len(record):
      break
    example[name] = np.frombuffer(record[start:stop], dtype)
    start = stop
  if start != len(record) or len(example) != len(manifest.fields()):
    raise ConfigError(
      f"a record of split {manifest.split!r} has {len(record)} bytes, which is"
      " not what its manifest says: prepare the data again"
    )
  return example


def check_shards(folder: epath.Path, manifest: Manifest) -> None:
  """`ConfigError` unless all shards exist and have their recorded sizes."""
  for shard in manifest.shards:
    path = folder / shard.file
    try:
      size = path.stat().length
    except OSError as error:
      raise ConfigError(
        f"{path} is missing: copy it again, or prepare the data again"
      ) from error
    if size != shard.bytes:
      raise ConfigError(
        f"{path} has {size:,} bytes, its manifest says {shard.bytes:,}: copy"
        " it again, or prepare the data again"
      )


def load(config: DataConfig, vocab_size: int) -> Json:
  """Example sources of `config.path`; `ConfigError` if unusable.

  `train` mixes the folders by `data.records.weights`; `in_order` holds the
  train examples of all of them one after the other; valid and test are the
  first folder's.
  """
  folders = _folders(config)
  manifests = [read_manifest(folder / "train") for folder in folders]
  for folder, manifest in zip(folders, manifests, strict=True):
    _check(folder, manifest, manifests[0], config, vocab_size)
  weights = config.records.weights
  if weights and len(weights) != len(folders):
    raise ConfigError(
      f"data.records.weights has {len(weights)} weights for {len(folders)}"
      " folders in data.path"
    )
  shares = weights or (1.0,) * len(folders)
  groups: list[tuple[Examples, float]] = []
  for folder, manifest, share in zip(folders, manifests, shares, strict=True):
    here = folder / "train"
    groups += [
      (Examples(here, manifest, group), share * part)
      for group, part in _group_shares(here, manifest, config).items()
    ]
  sources = {
    "train": _mixture(groups, config.seed),
    "in_order": _Joined([examples for examples, _ in groups]),
  }
  for split in ("valid", "test"):
    manifest = read_manifest(folders[0] / split)
    _check(folders[0], manifest, manifests[0], config, vocab_size)
    here = folders[0] / split
    names = sorted({shard.group for shard in manifest.shards})
    sources[split] = _Joined([Examples(here, manifest, g) for g in names])
  return sources


def fingerprint(config: DataConfig) -> dict[str, str]:
  """Hashes of all manifests (which hold the shards') and of the tokenizer."""
  folders = _folders(config)
  manifests = [read_manifest(folder / "train") for folder in folders]
  manifests += [read_manifest(folders[0] / name) for name in ("valid", "test")]
  content = "".join(to_json(manifest) for manifest in manifests)
  return {
    "content": hashlib.sha256(content.encode()).hexdigest(),
    "tokenizer": manifests[0].tokenizer.sha256,
  }


def load_tokenizer(config: DataConfig) -> tokenizer.Tokenizer:
  """The tokenizer that made the data."""
  folder = _folders(config)[0]
  wanted = read_manifest(folder / "train").tokenizer
  if wanted.name == tokenizer.BYTES:
    return tokenizer.Bytes()
  found = tokenizer.load(folder / wanted.name)
  if found.sha256 != wanted.sha256:
    raise ConfigError(
      f"{folder / wanted.name} is not the tokenizer that made {folder}"
      " (its manifest has another hash): copy the right one there"
    )
  return found


def check_alignment(config: Config) -> None:
  """`ConfigError` unless documents begin where the memories' chunks do."""
  if config.data.kind != "records" or not config.model.memory_chunks:
    return
  for folder in _folders(config.data):
    align = read_manifest(folder / "train").align
    for chunk in config.model.memory_chunks:
      if align % chunk:
        raise ConfigError(
          f"documents in {folder} begin at multiples of {align}, not of the"
          f" memory's chunk length {chunk}: prepare the data again with"
          f" --align={chunk}"
        )


def _folders(config: DataConfig) -> list[epath.Path]:
  names = [name.strip() for name in config.path.split(",") if name.strip()]
  if not names:
    raise ConfigError("data.path is empty: give a folder of prepared data")
  return [files.reach(name) for name in names]


def _check(
  folder: epath.Path,
  manifest: Manifest,
  first: Manifest,
  config: DataConfig,
  vocab_size: int,
) -> None:
  if min((shard.examples for shard in manifest.shards), default=0) < 1:
    raise ConfigError(
      f"the {manifest.split} split of {folder} has no examples: prepare more"
      " data, or with a larger --holdout"
    )
  check_shards(folder / manifest.split, manifest)
  if manifest.length != config.sequence_length:
    raise ConfigError(
      f"{folder} holds examples of {manifest.length} tokens: set"
      f" data.sequence_length={manifest.length}, or prepare the data again"
    )
  size = manifest.tokenizer.vocab_size
  if size > vocab_size:
    raise ConfigError(
      f"model.vocab_size={vocab_size} is too small for the tokenizer of"
      f" {folder}: set it to {size}"
    )
  if manifest.tokenizer.sha256 != first.tokenizer.sha256:
    raise ConfigError(
      f"{folder} was made by another tokenizer than the first folder (or"
      " split) of data.path"
    )


def _group_shares(
  folder: epath.Path, manifest: Manifest, config: DataConfig
) -> dict[str, float]:
  """Shares of a folder's groups: by size, or as set by `long_share`."""
  sizes = collections.Counter()
  for shard in manifest.shards:
    sizes[shard.group] += shard.examples
  total = sum(sizes.values())
  shares = {name: size / total for name, size in sorted(sizes.items())}
  long_share = config.records.long_share
  if not long_share:
    return shares
  if set(shares) != {"long", "short"}:
    raise ConfigError(
      f"data.records.long_share={long_share}, but {folder} has no long and"
      " short documents apart: prepare it with --long=TOKENS"
    )
  return {
    "long": config.records.long_share,
    "short": 1 - config.records.long_share,
  }


def _mixture(groups: list[tuple["Examples", float]], seed: int) -> Any:
  """An endless mixture of groups by share, each reshuffled every epoch."""
  import grain

  datasets = [
    grain.MapDataset.source(cast(Any, examples))
    .seed(seed + i)
    .shuffle()
    .repeat()
    for i, (examples, _) in enumerate(groups)
  ]
  if len(datasets) == 1:
    return datasets[0]
  return grain.MapDataset.mix(datasets, [share for _, share in groups])


class _Joined:
  """Several sources one after the other."""

  def __init__(self, sources: list["Examples"]):
    self._sources = sources
    self._ends = np.cumsum([len(source) for source in sources])

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: int) -> Example:
    which = int(np.searchsorted(self._ends, index, side="right"))
    before = self._ends[which - 1] if which else 0
    return self._sources[which][int(index - before)]


class Examples:
  """Random access to the examples of a split's group, in order."""

  def __init__(self, folder: epath.Path, manifest: Manifest, group: str):
    from array_record.python import array_record_data_source

    self._manifest = manifest
    shards = [shard for shard in manifest.shards if shard.group == group]
    self._folder = folder
    with self._explained():
      self._source = array_record_data_source.ArrayRecordDataSource(
        [str(files.local(folder / shard.file)) for shard in shards]
      )
      count = len(self._source)
    expected = sum(shard.examples for shard in shards)
    if count != expected:
      raise ConfigError(
        f"the shards in {folder} hold {count} examples, their manifest says"
        f" {expected}: prepare the data again"
      )

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    try:
      yield
    except (RuntimeError, OSError) as error:  # for example of checksums
      raise ConfigError(
        f"a shard in {self._folder} is damaged ({files.reason(error)}): copy it"
        " again, or prepare the data again"
      ) from error

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Example:
    with self._explained():
      record = self._source[int(index)]
    raw = decode(record, self._manifest)
    return {
      "tokens": raw["tokens"].astype(np.int32),
      "targets": raw["targets"].astype(np.int32),
      "weights": raw["weights"].astype(np.float32),
      "segments": raw["segments"].astype(np.int32),
    }
