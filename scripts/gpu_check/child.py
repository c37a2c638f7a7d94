"""One job in a process of its own: appends its rows to a file, as JSON lines.

python -m scripts.gpu_check.child --rows=FILE JSON

JSON: {"module": of the part, "arguments": of its `rows`}.
"""

import importlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any


def write_rows(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
  """Appends rows; each is on the disk before the next one is worked on."""
  start = time.monotonic()
  with path.open("a") as file:
    for row in rows:
      row = {**row, "at_seconds": round(time.monotonic() - start, 1)}
      file.write(json.dumps(row) + "\n")
      file.flush()
      os.fsync(file.fileno())


def main(argv: Sequence[str]) -> None:
  path, job = argv[0].removeprefix("--rows="), json.loads(argv[1])
  module = importlib.import_module(job["module"])
  write_rows(pathlib.Path(path), module.rows(**job["arguments"]))


if __name__ == "__main__":
  main(sys.argv[1:])
