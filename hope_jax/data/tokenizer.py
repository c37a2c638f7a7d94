"""The byte tokenizer: a token is a byte of the UTF-8 text, vocabulary 256."""

import numpy as np

VOCAB_SIZE = 256


def encode(text: str) -> np.ndarray:
  """Text -> its UTF-8 bytes as int32 token numbers."""
  return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)


def decode(tokens: np.ndarray) -> str:
  """Token numbers -> text; bytes that are not UTF-8 become U+FFFD."""
  return bytes(np.asarray(tokens, np.uint8)).decode("utf-8", errors="replace")
