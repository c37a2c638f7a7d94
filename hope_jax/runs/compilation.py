"""Keeps compiled programs between runs, in JAX's persistent cache.

JAX writes a cache entry in place.  A process that is killed meanwhile leaves a
truncated one, which every later run would try to read, warn of and compile
again.  Such entries are removed at the start of a command, which checks only
those written since the last check; an empty file beside them has its date.
"""

import contextlib
import hashlib
import os
import pathlib
import sys
import zlib
from collections.abc import Callable

from etils import epath

from hope_jax.runs import files

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_NEWEST = 16  # entries that are checked; a truncated one is among the newest
_LOOKED = "last_look"  # the file whose date is that of the last check
_SECONDS = 2.0  # by which the dates of files may be wrong


def keep_programs() -> pathlib.Path | None:
  """Switches the cache on; returns its folder.

  It is $JAX_COMPILATION_CACHE_DIR, or `compiled` in $HOPE_JAX_CACHE.  Returns
  None if it is in a bucket, or cannot be written to: then every start compiles.
  """
  name = os.environ.get(_VARIABLE) or str(files.cache() / "compiled")
  if files.is_remote(name):
    return None  # the user's own choice, which JAX already uses
  folder = pathlib.Path(name)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    is_writable = os.access(folder, os.W_OK)
    remove_broken(folder)
  except OSError:
    is_writable = False
  if not is_writable:
    return None
  os.environ[_VARIABLE] = name
  if "jax" in sys.modules:
    import jax

    jax.config.update("jax_compilation_cache_dir", name)
  return folder


def remembered(name: str, key: str, compute: Callable[[], float]) -> float:
  """What `compute` returns, cached beside the programs by `name` and `key`.

  `key` must contain everything that the number depends on.
  """
  kept = os.environ.get(_VARIABLE)
  if not kept or files.is_remote(kept):
    return compute()
  digest = hashlib.sha256(key.encode()).hexdigest()[:32]
  path = epath.Path(kept) / f"{name}-{digest}"
  try:
    return float(path.read_text())
  except (OSError, ValueError):  # missing or truncated
    value = compute()
  with contextlib.suppress(OSError), files.writing(path) as part:
    part.write_text(repr(value))
  return value


def remove_broken(folder: pathlib.Path) -> None:
  """Removes new entries that were only written in part."""
  looked = folder / _LOOKED
  last = looked.stat().st_mtime - _SECONDS if looked.exists() else 0.0
  looked.touch()  # first: what is written meanwhile is checked next time
  dated = ((entry.stat().st_mtime, entry) for entry in folder.glob("*-cache"))
  new = [(date, entry) for date, entry in dated if date >= last]
  for _, entry in sorted(new, reverse=True)[:_NEWEST]:
    if not _is_whole(entry.read_bytes()):
      with contextlib.suppress(FileNotFoundError):
        entry.unlink()


def _is_whole(data: bytes) -> bool:
  """Whether a compressed entry ends where it should; True if unknown."""
  if len(data) < 8:
    return False
  if data[:4] == b"\x28\xb5\x2f\xfd":
    return _is_whole_zstd(data)
  if data[0] != 0x78:
    return True
  reader = zlib.decompressobj()
  try:
    reader.decompress(data)
  except zlib.error:
    return False
  return reader.eof


def _is_whole_zstd(data: bytes) -> bool:
  """Follows the sizes of a frame's blocks (RFC 8878, section 3.1.1)."""
  descriptor = data[4]
  is_single = bool(descriptor & 0x20)
  content = (1 if is_single else 0, 2, 4, 8)[descriptor >> 6]
  place = 5 + (not is_single) + (0, 1, 2, 4)[descriptor & 3] + content
  while place + 3 <= len(data):
    header = int.from_bytes(data[place : place + 3], "little")
    is_last, kind, size = header & 1, header >> 1 & 3, header >> 3
    place += 3 + (1 if kind == 1 else size)  # kind 1 repeats one byte
    if is_last:
      return place + 4 * bool(descriptor & 4) <= len(data)
  return False
