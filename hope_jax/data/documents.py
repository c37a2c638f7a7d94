"""Sources of documents (text, JSONL, parquet, TFDS), cut into parts.

A part is what one worker reads: a whole text file, a range of a JSONL file's
bytes, some row groups of a parquet file, or a range of a TFDS split.  The list
of parts depends on the inputs alone, and so does the order of all documents.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from hope_jax.config import ConfigError
from hope_jax.data import text as text_lib
from hope_jax.runs import files

PART_BYTES = 64 << 20
TFDS = "tfds:"
_KINDS = {
  ".txt": "text",
  ".jsonl": "jsonl",
  ".json": "jsonl",
  ".gz": "gzip",
  ".parquet": "parquet",
}


class Fields(NamedTuple):
  """Names of a record's fields; the text of `prompt` gets no loss."""

  text: str = "text"
  prompt: str | None = None


FIELDS = Fields()


class Part(NamedTuple):
  """Units `start` .. `stop - 1` of a source: bytes, row groups or examples."""

  path: str
  kind: str
  start: int
  stop: int
  bytes: int


class Text(NamedTuple):
  """A document: a prompt that is only read, and the text to be learned."""

  prompt: str
  text: str


def find(inputs: Sequence[str]) -> list[str]:
  """All files of `inputs`: files, folders and patterns, sorted."""
  found = []
  for name in inputs:
    if name.startswith(TFDS):
      found.append(name)
      continue
    path = files.reach(name)
    if any(c in name for c in "*?["):
      matches = [p for p in path.parent.glob(path.name) if not p.is_dir()]
    elif path.is_dir():
      matches = [p for p in path.iterdir() if p.suffix in _KINDS]
    else:
      matches = [path] if path.exists() else []
    if not matches:
      raise ConfigError(
        f"no input {name}: give files ({', '.join(_KINDS)}), folders, patterns"
        f" or {TFDS}name:split"
      )
    found += sorted(str(path) for path in matches)
  repeated = {name for name in found if found.count(name) > 1}
  if repeated:
    raise ConfigError(f"input {min(repeated)} is named twice")
  return found


def changed(name: str) -> float:
  """The time of a source's last change; 0 if it is unknown."""
  if name.startswith(TFDS):
    return 0.0
  return float(epath.Path(name).stat().mtime or 0)


def parts(
  paths: Sequence[str],
  part_bytes: int = PART_BYTES,
  fields: Fields = FIELDS,
) -> list[Part]:
  """The parts of all sources, in order; `ConfigError` for sources that are
  unusable, as far as that shows before their documents are read."""
  return [part for path in paths for part in _parts(path, part_bytes, fields)]


def _parts(name: str, part_bytes: int, fields: Fields) -> list[Part]:
  if name.startswith(TFDS):
    source, size = _tfds(name), 1000
    count = len(source)
    return [
      Part(name, "tfds", i, min(i + size, count), 0)
      for i in range(0, count, size)
    ]
  path = epath.Path(name)
  kind = _KINDS.get(path.suffix)
  if kind is None:
    raise ConfigError(
      f"{name}: the ending {path.suffix!r} is none of {', '.join(_KINDS)}"
    )
  size = path.stat().length
  if not size:
    raise ConfigError(f"{name} is empty")
  if kind == "jsonl":
    starts = range(0, size, part_bytes)
    return [
      Part(name, kind, i, min(i + part_bytes, size), min(part_bytes, size - i))
      for i in starts
    ]
  if kind == "parquet":
    return _row_groups(path, part_bytes, fields)
  return [Part(name, kind, 0, size, size)]


def _row_groups(
  path: epath.Path, part_bytes: int, fields: Fields
) -> list[Part]:
  file = _parquet(path)
  _check_columns(path, file, fields)
  metadata = file.metadata
  found, start, held = [], 0, 0
  for group in range(metadata.num_row_groups):
    held += metadata.row_group(group).total_byte_size
    if held >= part_bytes or group + 1 == metadata.num_row_groups:
      found.append(Part(str(path), "parquet", start, group + 1, held))
      start, held = group + 1, 0
  return found


def _check_columns(path: epath.Path, file: Any, fields: Fields) -> None:
  """`ConfigError` unless the columns exist, are text and, by the statistics in
  the file's footer, have no nulls."""
  import pyarrow

  schema = file.schema_arrow
  for name in filter(None, fields):
    if name not in schema.names:
      raise ConfigError(
        f"{path} has no column {name!r}; it has {', '.join(schema.names)}"
      )
    kind = schema.field(name).type
    if pyarrow.types.is_dictionary(kind):
      kind = kind.value_type
    if kind not in (pyarrow.string(), pyarrow.large_string()):
      raise ConfigError(f"{path}: column {name!r} is {kind}, not text")
    for group in range(file.metadata.num_row_groups):
      row_group = file.metadata.row_group(group)
      columns = map(row_group.column, range(row_group.num_columns))
      found = next(c for c in columns if c.path_in_schema == name)
      if found.statistics and found.statistics.null_count:
        raise ConfigError(
          f"{path}: column {name!r} has {found.statistics.null_count} rows"
          f" without a value in row group {group}: remove them"
        )


def read(part: Part, fields: Fields) -> Iterator[Text]:
  """The documents of a part; `ConfigError` names the place of a bad one."""
  return _READERS[part.kind](part, fields)


def _read_text(part: Part, fields: Fields) -> Iterator[Text]:
  del fields
  yield Text(
    "", text_lib.decode(epath.Path(part.path).read_bytes(), part.path, 0)
  )


def _read_jsonl(part: Part, fields: Fields) -> Iterator[Text]:
  """The documents of the lines that begin inside the part."""
  with epath.Path(part.path).open("rb") as file:
    if part.start:
      file.seek(part.start - 1)
      file.readline()
    while (place := file.tell()) < part.stop:
      yield from _line(file.readline(), part.path, place, fields)


def _read_gzip(part: Part, fields: Fields) -> Iterator[Text]:
  """Compressed JSONL, or one compressed text."""
  is_text = part.path.endswith(".txt.gz")
  place = 0
  try:
    with epath.Path(part.path).open("rb") as raw, gzip.open(raw) as file:
      if is_text:
        yield Text("", text_lib.decode(file.read(), part.path, 0))
        return
      for line in file:
        yield from _line(line, part.path, place, fields)
        place += len(line)
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise ConfigError(f"{part.path} is not a whole gzip file") from error


def _line(line: bytes, path: str, place: int, fields: Fields) -> Iterator[Text]:
  text = text_lib.decode(line, path, place)
  if not text.strip():
    return
  try:
    record = json.loads(text)
  except ValueError as error:
    raise ConfigError(f"{path}, byte {place}: not JSON ({error})") from error
  yield _text(record, fields, f"{path}, byte {place}")


def _read_parquet(part: Part, fields: Fields) -> Iterator[Text]:
  import pyarrow

  try:
    yield from _parquet_rows(part, fields)
  except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
    raise ConfigError(
      f"{part.path} is not a whole parquet file: {files.reason(error)}"
    ) from error


def _parquet_rows(part: Part, fields: Fields) -> Iterator[Text]:
  file = _parquet(epath.Path(part.path))
  columns = list(filter(None, fields))
  for group in range(part.start, part.stop):
    table = file.read_row_group(group, columns=columns)
    for row, record in enumerate(table.to_pylist()):
      yield _text(record, fields, f"{part.path}, row group {group}, row {row}")


def _read_tfds(part: Part, fields: Fields) -> Iterator[Text]:
  source = _tfds(part.path)
  for index in range(part.start, part.stop):
    where = f"{part.path}, example {index}"
    record = {
      key: text_lib.decode(value, where) if isinstance(value, bytes) else value
      for key, value in source[index].items()
    }
    yield _text(record, fields, where)


_READERS = {
  "text": _read_text,
  "jsonl": _read_jsonl,
  "gzip": _read_gzip,
  "parquet": _read_parquet,
  "tfds": _read_tfds,
}


def _parquet(path: epath.Path) -> Any:
  import pyarrow
  from pyarrow import parquet

  try:
    return parquet.ParquetFile(path.open("rb"))
  except (pyarrow.ArrowInvalid, OSError) as error:
    reason = str(error).splitlines()[0]
    raise ConfigError(f"{path} is not a parquet file: {reason}") from error


def _tfds(name: str) -> Any:
  """`tfds:name[/config][:version]:split`, a random-access source."""
  import tensorflow_datasets as tfds

  dataset, _, split = name.removeprefix(TFDS).rpartition(":")
  if not dataset:
    raise ConfigError(f"{name}: give {TFDS}name:split")
  try:
    return tfds.data_source(dataset, split=split)
  except Exception as error:  # the library raises its own kinds
    reason = str(error).strip().splitlines()[0]
    raise ConfigError(f"cannot open {name}: {reason}") from error


def _text(record: Any, fields: Fields, where: str) -> Text:
  if not isinstance(record, dict):
    raise ConfigError(f"{where}: not an object with a field {fields.text!r}")
  values = []
  for name in (fields.prompt, fields.text):
    value = "" if name is None else record.get(name)
    if not isinstance(value, str):
      if name in record:
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise ConfigError(f"{where}: field {name!r} is {kind}, not text")
      raise ConfigError(
        f"{where}: no text in field {name!r}; it has"
        f" {', '.join(map(str, record)) or 'nothing'}"
      )
    values.append(value)
  return Text(*values)
