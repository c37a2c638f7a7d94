"""Text <-> token numbers: bytes (a token is a byte), or a SentencePiece model.

A tokenizer is known by its `sha256`, which prepared data and runs record.
"""

import hashlib
import io
import pathlib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from etils import epath

from hope_jax.config import ConfigError

BYTES = "bytes"
VOCAB_SIZE = 256  # of bytes


class Tokenizer(Protocol):
  """What both kinds offer; `eos` ends a document, None if there is none."""

  @property
  def name(self) -> str: ...

  @property
  def vocab_size(self) -> int: ...

  @property
  def eos(self) -> int | None: ...

  @property
  def sha256(self) -> str: ...

  def encode(self, text: str) -> np.ndarray: ...

  def decode(self, tokens: np.ndarray) -> str: ...


def utf8(text: str) -> bytes:
  """The UTF-8 bytes of `text`; `ConfigError` for what came of other bytes."""
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
  eos = None
  sha256 = hashlib.sha256(BYTES.encode()).hexdigest()

  def encode(self, text: str) -> np.ndarray:
    """Text -> uint8 [tokens]."""
    return np.frombuffer(utf8(text), np.uint8)

  def decode(self, tokens: np.ndarray) -> str:
    """Token numbers -> text; bytes that are not UTF-8 become U+FFFD."""
    return bytes(np.asarray(tokens, np.uint8)).decode("utf-8", errors="replace")


class SentencePiece:
  """A SentencePiece model, from the content of its file."""

  def __init__(self, model: bytes, name: str):
    import sentencepiece

    self.model, self.name = model, name
    self.sha256 = hashlib.sha256(model).hexdigest()
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


def load(name: str | pathlib.Path | epath.Path) -> Tokenizer:
  """`bytes`, or the SentencePiece model in file `name`."""
  if str(name) == BYTES:
    return Bytes()
  path = epath.Path(name)
  try:
    return SentencePiece(path.read_bytes(), path.name)
  except OSError as error:
    raise ConfigError(
      f"cannot read the tokenizer {name}: give {BYTES!r} or the file of a"
      " SentencePiece model"
    ) from error


def train(texts: Iterable[str], vocab_size: int, seed: int = 0) -> bytes:
  """A SentencePiece model (unigram, byte fallback) of `texts`, its file.

  Lossless: no normalisation, spaces and line ends kept.  Long texts are
  passed in lines.  Deterministic: one thread.
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
