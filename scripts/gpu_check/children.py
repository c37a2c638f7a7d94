"""Jobs as child processes with a time limit, and their outcomes."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

from scripts.gpu_check.plan import Job, Row

DONE, FAILED, CUT = "done", "failed", "cut"
NOT_REACHED, LEFT_OUT = "not reached", "left out"


_running: set[subprocess.Popen] = set()


class Outcome(NamedTuple):
  """What became of a job: one of the words above, why, and its rows."""

  job: str
  part: str
  status: str
  message: str = ""
  seconds: float = 0.0
  rows: tuple[Row, ...] = ()


def run(
  job: Job,
  *,
  module: str,
  folder: pathlib.Path,
  seconds: float,
  environment: Mapping[str, str],
  tiny: bool,
  before: Row | None = None,
) -> Outcome:
  """Runs a job for at most `seconds`; rows and log are files in `folder`."""
  arguments = dict(job.arguments)
  if tiny:
    arguments["tiny"] = True
  if job.after:
    arguments["before"] = before
  rows, log = folder / f"{job.name}.jsonl", folder / f"{job.name}.log"
  rows.unlink(missing_ok=True)
  command = [sys.executable, "-m", "scripts.gpu_check.child", f"--rows={rows}"]
  command.append(json.dumps({"module": module, "arguments": arguments}))
  start = time.monotonic()
  with log.open("w") as output:
    child = subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=output,
      stderr=subprocess.STDOUT,
      env={**os.environ, **environment},
      start_new_session=True,  # what it starts ends with it
    )
    _running.add(child)
    try:
      code = child.wait(timeout=seconds)
      status, message = (DONE, "") if code == 0 else (FAILED, _why(code, log))
    except subprocess.TimeoutExpired:
      status, message = CUT, f"after {seconds:.0f} s"
    finally:
      _end(child)
  return Outcome(
    job.name,
    job.part,
    status,
    message,
    round(time.monotonic() - start, 1),
    tuple(read_rows(rows)),
  )


def end_all() -> None:
  """Ends the children of all threads."""
  for child in list(_running):
    _end(child)


def _end(child: subprocess.Popen) -> None:
  """Kills the child's session: a hanging compiler reacts to nothing else."""
  _running.discard(child)
  with contextlib.suppress(ProcessLookupError):
    os.killpg(child.pid, signal.SIGKILL)
  child.wait()


def _why(code: int, log: pathlib.Path) -> str:
  """How a child ended, and the last line that it wrote."""
  ended = f"exit code {code}"
  if code < 0:
    ended = f"killed by {signal.Signals(-code).name}"
  lines = log.read_text(errors="replace").split("\n")
  said = [line.strip() for line in lines if line and not line.startswith("#")]
  errors = [line for line in said if "Error" in line.split(":")[0]]
  last = (errors or said or [""])[-1]
  return f"{ended}: {last[:300]}" if last else ended


def read_rows(path: pathlib.Path) -> list[Row]:
  """The rows of a file, the last of each name; skips half-written lines."""
  found: dict[str, Row] = {}
  try:
    lines = path.read_text().splitlines()
  except OSError:
    return []
  for line in lines:
    try:
      row = json.loads(line)
    except ValueError:
      continue
    found[row["row"]] = row
  return list(found.values())
