"""Text files: loading, splitting, windows of T + 1 tokens (bytes by default).

A window holds T inputs and, one position later, their T targets.  Windows do
not overlap, so an epoch predicts every token at most once.  Training shuffles
them and shifts them by a new offset each epoch; evaluation reads a split in
order, down to its last token.

Legend: T tokens of a window.
"""

import functools
import hashlib
from typing import Any

import numpy as np
from etils import epath

from hope_jax.config import ConfigError, DataConfig
from hope_jax.data import tokenizer
from hope_jax.runs import files

REPOSITORY = epath.Path(__file__).resolve().parents[2]
SPLITS = ("train", "valid", "test")

Example = dict[str, np.ndarray]


class TrainWindows:
  """Endless shuffled windows; example `index` depends on the seed alone."""

  def __init__(self, tokens: np.ndarray, length: int, seed: int):
    self._tokens, self._length, self._seed = tokens, length, seed
    self._per_epoch = len(tokens) // length - 1  # room for any offset

  def __getitem__(self, index: int) -> Example:
    epoch, position = divmod(index, self._per_epoch)
    offset, order = _epoch_order(
      self._seed, epoch, self._length, self._per_epoch
    )
    start = offset + int(order[position]) * self._length
    window = self._tokens[start : start + self._length + 1].astype(np.int32)
    return {
      "tokens": window[:-1],
      "targets": window[1:],
      "weights": np.ones(self._length, np.float32),
    }


@functools.lru_cache(maxsize=4)
def _epoch_order(
  seed: int, epoch: int, length: int, count: int
) -> tuple[int, np.ndarray]:
  """The offset of an epoch's windows, below `length`, and their order."""
  rng = np.random.default_rng([seed, epoch])
  return int(rng.integers(length)), rng.permutation(count)


class EvalWindows:
  """The windows of a split in order; the last is padded with weight 0."""

  def __init__(self, tokens: np.ndarray, length: int):
    self._tokens, self._length = tokens, length

  def __len__(self) -> int:
    return -(-(len(self._tokens) - 1) // self._length)

  def __getitem__(self, index: int) -> Example:
    start = index * self._length
    window = self._tokens[start : start + self._length + 1].astype(np.int32)
    known = len(window) - 1
    window = np.pad(window, (0, self._length - known))
    return {
      "tokens": window[:-1],
      "targets": window[1:],
      "weights": (np.arange(self._length) < known).astype(np.float32),
    }


def find(path: str) -> epath.Path:
  """`path` as given, or below the repository root if it is only there."""
  given = files.reach(path)
  beside = REPOSITORY / path
  if given.exists() or given.is_absolute() or not beside.exists():
    return given
  return beside


def decode(data: bytes, path: Any, place: int = 0) -> str:
  """Decodes UTF-8 bytes that begin at byte `place` of a file."""
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ConfigError(
      f"{path} is not UTF-8 text: byte {place + error.start} is"
      f" 0x{error.object[error.start]:02x} ({error.reason})"
    ) from error


def read(path: epath.Path) -> np.ndarray:
  """The bytes of one UTF-8 file; `ConfigError` if it is anything else."""
  try:
    data = path.read_bytes()
  except OSError as error:
    raise ConfigError(f"cannot read {path}: {files.reason(error)}") from error
  decode(data, path)
  if not data:
    raise ConfigError(f"{path} is empty")
  return np.frombuffer(data, np.uint8)


def read_splits(config: DataConfig) -> dict[str, np.ndarray]:
  """train, valid and test bytes of `config.path` (see `DataConfig`)."""
  folder = find(config.path)
  if folder.is_dir():
    return {name: read(folder / f"{name}.txt") for name in SPLITS}
  fractions = config.text.split
  if len(fractions) != 2 or min(fractions) <= 0 or sum(fractions) >= 1:
    raise ConfigError(
      f"data.text.split={fractions} must be two positive fractions, train and"
      " valid, with a sum below 1 (the rest is test)"
    )
  names = [name.strip() for name in config.path.split(",") if name.strip()]
  if not names:
    raise ConfigError("data.path is empty: give a text file or a folder")
  tokens = np.concatenate([read(find(name)) for name in names])
  ends = [int(len(tokens) * end) for end in np.cumsum(fractions)]
  return dict(zip(SPLITS, np.split(tokens, ends), strict=True))


def load_tokenizer(config: DataConfig) -> tokenizer.Tokenizer:
  """The tokenizer of `data.text`."""
  return tokenizer.load(config.text.tokenizer)


def fingerprint(config: DataConfig) -> dict[str, str]:
  """SHA-256 of all splits, and of the tokenizer."""
  digest = hashlib.sha256()
  for name, tokens in read_splits(config).items():
    digest.update(f"{name} {len(tokens)} ".encode())
    digest.update(tokens.tobytes())
  return {
    "content": digest.hexdigest(),
    "tokenizer": load_tokenizer(config).sha256,
  }


def load(
  config: DataConfig, vocab_size: int
) -> dict[str, TrainWindows | EvalWindows]:
  """Example sources of the three splits; `ConfigError` if unusable."""
  words = tokenizer.load(config.text.tokenizer)
  if vocab_size < words.vocab_size:
    raise ConfigError(
      f"model.vocab_size={vocab_size} is too small for {words.name}:"
      f" set it to {words.vocab_size}"
    )
  splits = read_splits(config)
  if config.text.tokenizer != tokenizer.BYTES:
    splits = {name: _encode(part, words) for name, part in splits.items()}
  length = config.sequence_length
  for name, least in (("train", 2 * length), ("valid", 2), ("test", 2)):
    if len(splits[name]) < least:
      raise ConfigError(
        f"the {name} split of {config.path} has {len(splits[name])} tokens"
        f" ({words.name}), fewer than the {least} needed"
        f" (data.sequence_length={length})"
      )
  return {
    "train": TrainWindows(splits["train"], length, config.seed),
    "in_order": EvalWindows(splits["train"], length),
    "valid": EvalWindows(splits["valid"], length),
    "test": EvalWindows(splits["test"], length),
  }


def _encode(part: np.ndarray, words: tokenizer.Tokenizer) -> np.ndarray:
  """Bytes -> tokens; characters that a split cuts in two are left out."""
  return words.encode(part.tobytes().decode("utf-8", errors="ignore"))
