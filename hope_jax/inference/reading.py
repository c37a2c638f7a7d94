"""Text files as tokens, without holding a whole file."""

from collections.abc import Iterator

import numpy as np
from etils import epath

from hope_jax.config import ConfigError
from hope_jax.data import text as text_lib
from hope_jax.data.tokenizer import Tokenizer
from hope_jax.runs import files

TEXT = 1 << 20  # bytes of a text that are encoded at a time


def read_text(
  path: epath.Path, tokenizer: Tokenizer, first: int, size: int
) -> Iterator[np.ndarray]:
  """Tokens of a UTF-8 file: `first` of them, then `size` at a time.

  Only a part of the file is held.  Parts end at line ends: the SentencePiece
  models of this project encode every line by itself anyway.
  """
  held, count, wanted = [], 0, first
  for part in _parts(path):
    held.append(tokenizer.encode(part))
    count += len(held[-1])
    while count >= wanted:
      joined = np.concatenate(held)
      yield joined[:wanted]
      held, count, wanted = [joined[wanted:]], count - wanted, size
  if count:
    yield np.concatenate(held)


def check_text(path: epath.Path) -> None:
  """`ConfigError` for a file that `read_text` cannot read to its end."""
  for _ in _parts(path):
    pass


def _parts(path: epath.Path) -> Iterator[str]:
  place, rest = 0, b""
  try:
    with path.open("rb") as file:
      while read := file.read(TEXT):
        data = rest + read
        end = data.rfind(b"\n") + 1
        if not end:  # cut before the last character: it may be partial
          end = len(data) - 1
          while end > len(data) - 4 and data[end] & 0xC0 == 0x80:
            end -= 1
        yield text_lib.decode(data[:end], path, place)
        rest, place = data[end:], place + end
  except OSError as error:
    raise ConfigError(f"cannot read {path}: {files.reason(error)}") from error
  if not place + len(rest):
    raise ConfigError(f"{path} is empty")
  yield text_lib.decode(rest, path, place)
