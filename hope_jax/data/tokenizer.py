"""Text <-> token numbers: bytes (a token is a byte), a SentencePiece model, or
a `tokenizer.json` of Hugging Face (package `tokenizers`, extra `convert`).

A tokenizer is identified by its `sha256`, which prepared data and runs record.
"""

import hashlib
import io
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from etils import epath

from hope_jax.config import ConfigError
from hope_jax.runs import files

BYTES = "bytes"
VOCAB_SIZE = 256  # of bytes
MODEL, JSON = "tokenizer.model", "tokenizer.json"
SETTINGS = "tokenizer_config.json"  # beside a tokenizer.json


class Tokenizer(Protocol):
  """The interface of all kinds.

  Attributes:
    bos: the token that an imported model's tokenizer puts before every text;
      None: there is none.
    eos: the token that ends a document; None: there is none.
    files: name -> content of the files that `load` needs; the first is the one
      whose path it takes.
  """

  @property
  def name(self) -> str: ...

  @property
  def vocab_size(self) -> int: ...

  @property
  def bos(self) -> int | None: ...

  @property
  def eos(self) -> int | None: ...

  @property
  def sha256(self) -> str: ...

  @property
  def files(self) -> Mapping[str, bytes]: ...

  def encode(self, text: str) -> np.ndarray: ...

  def decode(self, tokens: np.ndarray) -> str: ...


def utf8(text: str) -> bytes:
  """The UTF-8 bytes of `text`; `ConfigError` if it stems from other bytes."""
  try:
    return text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ConfigError(
      f"the text is not UTF-8: character {error.start} stands for a byte that"
      " could not be read"
    ) from error


class Bytes:
  """A token is a byte of the UTF-8 text; there is no end token."""

  name = BYTES
  vocab_size = VOCAB_SIZE
  bos = eos = None
  sha256 = hashlib.sha256(BYTES.encode()).hexdigest()
  files: Mapping[str, bytes] = {}

  def encode(self, text: str) -> np.ndarray:
    """Text -> uint8 [tokens]."""
    return np.frombuffer(utf8(text), np.uint8)

  def decode(self, tokens: np.ndarray) -> str:
    """Token numbers -> text; bytes that are not UTF-8 become U+FFFD."""
    return bytes(np.asarray(tokens, np.uint8)).decode("utf-8", errors="replace")


class SentencePiece:
  """A SentencePiece model, from the content of its file."""

  bos = None  # the file does not say whether texts begin with one

  def __init__(self, model: bytes, name: str):
    import sentencepiece

    self.model, self.name = model, name
    self.sha256 = hashlib.sha256(model).hexdigest()
    self.files = {MODEL: model}
    self._processor: Any = sentencepiece.SentencePieceProcessor()
    try:
      self._processor.LoadFromSerializedProto(model)
    except (RuntimeError, UnicodeDecodeError) as error:
      raise ConfigError(f"{name} is not a SentencePiece model") from error
    self.vocab_size = self._processor.vocab_size()
    eos = self._processor.eos_id()
    self.eos = None if eos < 0 else eos

  def __reduce__(self):
    return SentencePiece, (self.model, self.name)

  def encode(self, text: str) -> np.ndarray:
    """Text -> int32 [tokens]; `ConfigError` for an unknown character."""
    utf8(text)
    tokens = np.asarray(self._processor.encode(text), np.int32)
    if (tokens == self._processor.unk_id()).any():
      unknown = next(
        c for c in text if self._processor.unk_id() in self._processor.encode(c)
      )
      raise ConfigError(
        f"{self.name} has no token for {unknown!r}: use a model with byte"
        " fallback, or remove it"
      )
    return tokens

  def decode(self, tokens: np.ndarray) -> str:
    """Token numbers -> text; numbers outside the vocabulary are left out."""
    known = [int(t) for t in tokens if t < self.vocab_size]
    return self._processor.decode(known)


class HuggingFace:
  """A `tokenizer.json`; text that spells a special token becomes that token.

  `eos` is the name of the end token, which a `tokenizer.json` does not say.
  """

  def __init__(self, model: bytes, name: str, eos: str | None):
    try:
      import tokenizers
    except ImportError as error:
      raise ConfigError(
        f"{name} needs the package tokenizers: install the extra convert"
      ) from error
    self.model, self.name, self._eos = model, name, eos
    self.sha256 = hashlib.sha256(model).hexdigest()
    settings = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "eos_token": eos,
      "clean_up_tokenization_spaces": False,  # transformers 4 would drop spaces
    }
    self.files = {JSON: model, SETTINGS: json.dumps(settings).encode()}
    try:
      self._tokenizer = tokenizers.Tokenizer.from_buffer(model)
    except Exception as error:  # the library raises plain Exception
      raise ConfigError(f"{name} is not a tokenizer of Hugging Face") from error
    known = self._tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(known.values(), default=-1) + 1
    self.eos = known.get(eos) if eos else None
    plain, full = (
      self._tokenizer.encode("a", add_special_tokens=special).ids
      for special in (False, True)
    )
    has_bos = full[1 : len(plain) + 1] == plain and full != plain
    self.bos = full[0] if has_bos else None

  def __reduce__(self):
    return HuggingFace, (self.model, self.name, self._eos)

  def encode(self, text: str) -> np.ndarray:
    """Text -> int32 [tokens], with `bos` only where the text spells it."""
    utf8(text)
    found = self._tokenizer.encode(text, add_special_tokens=False)
    return np.asarray(found.ids, np.int32)

  def decode(self, tokens: np.ndarray) -> str:
    """Token numbers -> text; numbers outside the vocabulary are left out."""
    known = [int(t) for t in tokens if t < self.vocab_size]
    return self._tokenizer.decode(known, skip_special_tokens=False)


def load(name: str | pathlib.Path | epath.Path) -> Tokenizer:
  """`bytes`, or the SentencePiece model or `tokenizer.json` in file `name`.

  The end token of a `tokenizer.json` is that of the `tokenizer_config.json`
  beside it.
  """
  if str(name) == BYTES:
    return Bytes()
  path = epath.Path(name)
  try:
    model = path.read_bytes()
    if path.suffix == ".json":
      return HuggingFace(model, path.name, _end_token(path.parent / SETTINGS))
    return SentencePiece(model, path.name)
  except OSError as error:
    raise ConfigError(
      f"cannot read the tokenizer {name}: give {BYTES!r}, or the file of a"
      " SentencePiece model or a tokenizer.json"
    ) from error


def save(words: Tokenizer, folder: epath.Path) -> None:
  """Writes the tokenizer's files."""
  for name, content in words.files.items():
    with files.writing(folder / name) as beside:
      beside.write_bytes(content)


def _end_token(path: epath.Path) -> str | None:
  """`eos_token` of a tokenizer_config.json, if there is one."""
  if not path.exists():
    return None
  try:
    token = json.loads(path.read_text()).get("eos_token")
  except (ValueError, AttributeError) as error:
    raise ConfigError(f"{path} is not a tokenizer_config.json") from error
  return token.get("content") if isinstance(token, dict) else token


def train(texts: Iterable[str], vocab_size: int, seed: int = 0) -> bytes:
  """Trains a SentencePiece model (unigram, byte fallback); returns its file.

  The model is lossless: nothing is normalised, spaces and line ends are kept.
  Texts are passed line by line.  One thread makes training deterministic.
  """
  import sentencepiece

  writer = io.BytesIO()
  sentencepiece.set_random_generator_seed(seed)
  lines = (line for text in texts for line in text.splitlines() if line)
  try:
    sentencepiece.SentencePieceTrainer.Train(
      sentence_iterator=lines,
      model_writer=writer,
      vocab_size=vocab_size,
      model_type="unigram",
      byte_fallback=True,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      user_defined_symbols=["\n"],
      input_sentence_size=2_000_000,
      shuffle_input_sentence=True,
      max_sentence_length=1 << 16,
      num_threads=1,
      minloglevel=2,
    )
  except RuntimeError as error:
    reason = str(error).splitlines()[-1].rpartition("] ")[2]
    raise ConfigError(
      f"cannot train a tokenizer of {vocab_size} tokens: {reason}"
    ) from error
  return writer.getvalue()
