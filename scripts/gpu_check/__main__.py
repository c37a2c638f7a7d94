"""Works through the jobs of `plan.py` that are left.

python -m scripts.gpu_check [--output=DIR] [--tiny] [--parts=A,B] [--seconds=N]

Run again with the same --output, it continues with what is not done yet.
"""

import argparse
import datetime
import os
import pathlib
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent import futures
from typing import NoReturn

from scripts.gpu_check import children, plan, report
from scripts.gpu_check.children import Outcome
from scripts.gpu_check.plan import Job, Row

SECONDS = 540.0
_LEAST = 5.0  # seconds; with less time no job is started
_CORES = 4  # for each of several jobs that run at once
_OUTPUT = "experiments/speed/gpu"
_JOBS = "jobs"  # the folder of the raw rows and of logs


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    self.exit(2, f"error: {message}\n")


class Run:
  """The jobs of one call: which are left, the time there is, the outcomes."""

  def __init__(
    self,
    jobs: Sequence[Job],
    *,
    folder: pathlib.Path,
    machine: Row,
    earlier: Sequence[Outcome],
    until: float,
    environment: dict[str, str],
    tiny: bool,
  ):
    self._folder, self._machine, self._tiny = folder, machine, tiny
    self._until, self._environment = until, environment
    self._lock = threading.Lock()
    self._found = {outcome.job: outcome for outcome in earlier}
    status = {outcome.job: outcome.status for outcome in earlier}
    left = [job for job in jobs if status.get(job.name) != children.DONE]
    tried = (children.CUT, children.FAILED)
    # Jobs that were cut or failed the last time come after all others.
    self._again = [job for job in left if status.get(job.name) in tried]
    self._new = [job for job in left if job not in self._again]
    self._order = [job.name for job in plan.jobs(tiny)]

  def run(self) -> None:
    """Runs part after part, then what they left undone, while there is time."""
    parts = list(dict.fromkeys(job.part for job in self._new))
    start = time.monotonic()
    ends = plan.deadlines(parts, self._until - start) if parts else {}
    for part in parts:
      jobs = [job for job in self._new if job.part == part]
      if names := plan.missing(part):
        verb = "is" if len(names) == 1 else "are"
        message = f"{', '.join(names)} {verb} not installed"
        print(f"{part}: left out: {message}", flush=True)
        for job in jobs:
          out = Outcome(job.name, part, children.LEFT_OUT, message)
          self._keep(out, quiet=True)
        continue
      self._all(jobs, until=start + ends[part])
    for job in self._new:
      found = self._found.get(job.name)
      if found is None or found.status == children.NOT_REACHED:
        self._one(job, until=self._until)
    for job in self._again:
      if not plan.missing(job.part):
        self._one(job, until=self._until, limit=SECONDS)

  def _all(self, jobs: Sequence[Job], until: float) -> None:
    workers = 1
    if plan.PARTS[jobs[0].part].together:
      workers = max(1, min(len(jobs), (os.cpu_count() or 1) // _CORES))
    pool = futures.ThreadPoolExecutor(workers)
    try:
      for future in [pool.submit(self._one, job, until) for job in jobs]:
        future.result()
    except BaseException:  # this process is ending
      pool.shutdown(wait=False, cancel_futures=True)
      children.end_all()
      raise
    pool.shutdown()

  def _one(self, job: Job, until: float, limit: float | None = None) -> None:
    seconds = min(limit or job.seconds, until - time.monotonic())
    if seconds < _LEAST:
      if job.name not in self._found:
        out = Outcome(job.name, job.part, children.NOT_REACHED)
        self._keep(out, quiet=True)
      return
    environment = dict(self._environment)
    if plan.PARTS[job.part].together or "pytorch" in job.name:
      environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    before = self._found.get(job.after)
    outcome = children.run(
      job,
      module=plan.PARTS[job.part].module,
      folder=self._folder / _JOBS,
      seconds=seconds,
      environment=environment,
      tiny=self._tiny,
      before=before.rows[-1] if before and before.rows else None,
    )
    self._keep(outcome)

  def _keep(self, outcome: Outcome, quiet: bool = False) -> None:
    with self._lock:
      self._found[outcome.job] = outcome
      known = [self._found[name] for name in self._order if name in self._found]
      report.write(self._folder, self._machine, known)
      if not quiet:
        why = f": {outcome.message}" if outcome.message else ""
        rows = f"{len(outcome.rows)} rows, {outcome.seconds:.0f} s"
        line = f"{outcome.job}: {outcome.status}{why} ({rows})"
        print(line, flush=True)

  @property
  def outcomes(self) -> list[Outcome]:
    return list(self._found.values())


def _machine(environment: dict[str, str], tiny: bool) -> Row:
  """What JAX sees, asked in a child process, which then frees the GPU."""
  with tempfile.TemporaryDirectory() as folder:
    outcome = children.run(
      plan.MACHINE,
      module=plan.MACHINE_MODULE,
      folder=pathlib.Path(folder),
      seconds=plan.MACHINE.seconds,
      environment=environment,
      tiny=tiny,
    )
  if not outcome.rows:
    raise ValueError(f"jax does not start: {outcome.message}")
  machine = outcome.rows[-1]
  if not tiny and machine["platform"] != "gpu":
    raise ValueError(
      f"jax sees no GPU ({machine['device']}); --tiny checks the script itself"
    )
  return machine


def _output(name: str, machine: Row) -> pathlib.Path:
  """The folder of the results, made if it is not there."""
  if not name:
    kind = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    name = f"{_OUTPUT}/{datetime.date.today().isoformat()}-{kind}"
  folder = pathlib.Path(name)
  try:
    (folder / _JOBS).mkdir(parents=True, exist_ok=True)
    (folder / ".write").touch()
    (folder / ".write").unlink()
  except OSError as error:
    raise ValueError(
      f"cannot write --output={name} ({error.strerror})"
    ) from error
  return folder


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = _Parser("scripts/gpu_check.sh", allow_abbrev=False)
  parser.add_argument(
    "--output", default="", help=f"folder; {_OUTPUT}/<date>-<device>"
  )
  parser.add_argument(
    "--tiny", action="store_true", help="toy sizes, on the CPU"
  )
  parser.add_argument("--parts", default=",".join(plan.PARTS))
  parser.add_argument(
    "--seconds", type=float, default=SECONDS, help="of all parts together"
  )
  flags = parser.parse_args(argv)
  flags.parts = flags.parts.split(",")
  for part in flags.parts:
    if part not in plan.PARTS:
      parser.error(f"--parts={part} is not one of {', '.join(plan.PARTS)}")
  if not 0 < flags.seconds < float("inf"):
    parser.error(f"--seconds={flags.seconds:g} must be positive")
  return flags


def main(argv: Sequence[str] | None = None) -> int:
  """Exit code 0: all done and passed; 1: not all; 2: wrong flag or machine."""
  flags = _parse(argv)
  until = time.monotonic() + flags.seconds
  jobs = [job for job in plan.jobs(flags.tiny) if job.part in flags.parts]
  with tempfile.TemporaryDirectory() as cache:
    environment = _environment(cache, flags.tiny)
    try:
      machine = _machine(environment, flags.tiny)
      folder = _output(flags.output, machine)
      earlier = report.read(folder)
      if earlier and earlier[0]["device"] != machine["device"]:
        raise ValueError(
          f"--output={folder} has results of {earlier[0]['device']}"
        )
      if earlier and earlier[0]["sizes"] != machine["sizes"]:
        raise ValueError(
          f"--output={folder} has results of {earlier[0]['sizes']} sizes"
        )
    except ValueError as error:
      print(f"error: {error}", file=sys.stderr)
      return 2
    run = Run(
      jobs,
      folder=folder,
      machine=machine,
      earlier=earlier[1] if earlier else (),
      until=until,
      environment=environment,
      tiny=flags.tiny,
    )
    run.run()
  print(f"results: {folder / report.REPORT}")
  wrong = [o.job for o in run.outcomes if o.status != children.DONE]
  wrong += [
    f"{row['row']} (not within its bound)"
    for outcome in run.outcomes
    for row in outcome.rows
    if row.get("pass") is False
  ]
  if wrong:
    print(f"not done or not passed: {', '.join(wrong)}")
  return int(bool(wrong))


def _environment(cache: str, tiny: bool) -> dict[str, str]:
  """Environment of all children.  Compiled programs are kept only for the other
  jobs of this call, so that compile times are those of a first start."""
  environment = {
    "JAX_COMPILATION_CACHE_DIR": cache,
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
  }
  if tiny:
    environment |= {
      "JAX_PLATFORMS": "cpu",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }
  return environment


def _stop(*_) -> NoReturn:
  """Ends this process as Ctrl-C does: its children do not outlive it."""
  raise KeyboardInterrupt


if __name__ == "__main__":
  signal.signal(signal.SIGTERM, _stop)
  try:
    sys.exit(main())
  except KeyboardInterrupt:
    sys.exit(130)
