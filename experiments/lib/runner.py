"""Runs an experiment's trials as subprocesses, and knows what is done.

A trial is done when its folder has a result.json with the trial's own config
and every evaluation it asks for; anything else is (re)started, and the
trainer resumes from its last checkpoint.  So the same command runs, continues
or reprints an experiment.  A failing trial is reported and does not stop the
others; at the budget's end or on Ctrl-C the running ones are ended and what
is left is listed.

Exit codes: 0 all done (of --rows, if given), 1 a trial failed, 2 wrong command
line or data, 3 the budget ended first, 130 Ctrl-C.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from experiments.lib.trials import ROOT, Plan, Trial, is_same, resolve
from hope_jax import files
from hope_jax.config import Config, ConfigError
from hope_jax.training import metrics
from hope_jax.training import workdir as workdir_lib

Command = list[str]
GRACE_SECONDS = 20.0  # from asking a process to end to killing it
STATUS_SECONDS = 20.0  # between two status lines
DONE, FAILED, LEFT = "done", "failed", "left"


class Record(NamedTuple):
  """A trial and what came of it; `status` is one of DONE, FAILED, LEFT."""

  trial: Trial
  status: str
  result: dict[str, Any] | None
  evaluations: dict[str, dict[str, Any]]
  message: str
  workdir: pathlib.Path


@dataclasses.dataclass
class _Process:
  trial: Trial
  popen: subprocess.Popen
  output: pathlib.Path  # exists when the command has succeeded
  start: float
  slot: int  # which of the jobs it is


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
  """The file's JSON object; None if it is missing, or holds none.

  NaN and infinity, which older versions wrote, are None.
  """
  try:
    content = json.loads(path.read_text(), parse_constant=lambda _: None)
  except (OSError, ValueError):
    return None
  return content if isinstance(content, dict) else None


def last_error(log: str) -> str:
  """The last line of a log that names an error, else the last line."""
  lines = log.strip().splitlines() or ["nothing was printed"]
  names_error = re.compile(r"error: |[\w.]*(Error|Exception)\b").match
  return (list(filter(names_error, lines)) or lines)[-1]


def from_root(path: pathlib.Path) -> pathlib.Path:
  """`path` as the processes, which run in ROOT, see it: published files
  should not name folders outside of the repository."""
  return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def core_share(slot: int, jobs: int) -> set[int]:
  """The cores of one of `jobs` processes: they do not share any, if they can.

  Two processes whose thread pools both span all cores slow each other down.
  """
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < jobs:
    return set(cores)
  return set(cores[slot * len(cores) // jobs : (slot + 1) * len(cores) // jobs])


def package_command(name: str) -> Command:
  """The package's command `name`."""
  return [sys.executable, "-m", f"hope_jax.{name}"]


def _flag(value: Any) -> str:
  """A value as ml_collections reads it from a command line."""
  return repr(value) if isinstance(value, tuple | list) else str(value)


class Runner:
  """Runs the trials of `plan`, at most `jobs` at a time, below `out`; of some
  `rows` only, if any are named."""

  def __init__(
    self,
    plan: Plan,
    out: pathlib.Path,
    *,
    jobs: int = 1,
    budget: float | None = None,
    rows: Sequence[str] = (),
    command: Callable[[str], Command] = package_command,
    poll_seconds: float = 0.5,
  ):
    self._plan, self._out = plan, out.resolve()
    self._jobs, self._budget, self._rows = jobs, budget, rows
    self._command, self._poll_seconds = command, poll_seconds
    self._running: list[_Process] = []
    self._failures: dict[str, str] = {}
    self._written: set[pathlib.Path] = set()  # outputs of this session
    self._configs: dict[str, Config] = {}
    self._last_status = time.monotonic()

  # What is done, what is next.

  def _config(self, trial: Trial) -> Config:
    if trial.name not in self._configs:
      self._configs[trial.name] = resolve(trial)
    return self._configs[trial.name]

  def _result(self, trial: Trial) -> dict[str, Any] | None:
    result = read_json(self._out / trial.name / workdir_lib.RESULT)
    if result is None:
      return None
    folder = from_root(self._out / trial.name)
    if not is_same(result.get("config", {}), self._config(trial)):
      self._failures[trial.name] = (
        f"{folder} holds the result of another config: remove it or choose"
        " another --out"
      )
      return None
    for name in ("valid_loss", "test_loss"):
      if not isinstance(result.get(name), float | int):
        self._failures[trial.name] = (
          f"{folder} holds a result whose {name} is no finite number: it has"
          " diverged, or the file is damaged; remove it to train again"
        )
        return None
    return result

  def _evaluations(self, trial: Trial) -> dict[str, dict[str, Any]]:
    """Finished evaluations of the model as it was at the training's end."""
    done = {}
    for evaluation in trial.evaluations:
      path = self._out / trial.name / f"evaluate_{evaluation.label}.json"
      content = read_json(path)
      steps = self._config(trial).train.steps
      is_sound = content and content.get("loss", 0.0) is not None
      if content and is_sound and content.get("step") == steps:
        done[evaluation.label] = content
    return done

  def _next_command(self, trial: Trial) -> tuple[Command, pathlib.Path] | None:
    """The trial's next command and the file it must leave; None when done."""
    workdir = self._out / trial.name
    shown = from_root(workdir)
    if self._result(trial) is None:
      flags = [
        f"--config.{field}={_flag(value)}"
        for field, value in trial.fields().items()
      ]
      config = f"--config={trial.config}:{trial.mode}"
      command = [*self._command("train"), config, f"--workdir={shown}", *flags]
      return command, workdir / workdir_lib.RESULT
    done = self._evaluations(trial)
    for evaluation in trial.evaluations:
      if evaluation.label not in done:
        name = f"evaluate_{evaluation.label}.json"
        flags = [f"--workdir={shown}", f"--output={shown / name}"]
        command = self._command(evaluation.command)
        command = [*command, *flags, *evaluation.flags]
        return command, workdir / name
    return None

  def records(self) -> list[Record]:
    """All trials that the plan names so far, with their state on disk."""
    records = []
    for trial in self._plan(self._results()):
      result = self._result(trial)
      evaluations = self._evaluations(trial) if result else {}
      message = self._failures.get(trial.name, "")
      is_done = result and len(evaluations) == len(trial.evaluations)
      status = FAILED if message else DONE if is_done else LEFT
      workdir = self._out / trial.name
      records.append(
        Record(trial, status, result, evaluations, message, workdir)
      )
    return records

  def _results(self) -> dict[str, dict[str, Any] | None]:
    """Results as a plan sees them: grows until the plan adds no trial."""
    results: dict[str, dict[str, Any] | None] = {}
    while True:
      names = len(results)
      for trial in self._plan(results):
        if trial.name not in results:
          result = self._result(trial)
          if result or trial.name in self._failures:
            results[trial.name] = result
      if len(results) == names:
        return results

  def _check_rows(self) -> None:
    known = list(dict.fromkeys(trial.row for trial in self._plan({})))
    for row in self._rows:
      if row not in known:
        raise ConfigError(f"--rows: no row {row!r}; rows: {', '.join(known)}")

  # Processes.

  def _start_more(self) -> None:
    if len(self._running) >= self._jobs:
      return
    busy = {process.trial.name for process in self._running}
    for trial in self._plan(self._results()):
      if len(self._running) >= self._jobs:
        return
      if trial.name in busy or trial.name in self._failures:
        continue
      if self._rows and trial.row not in self._rows:
        continue
      following = self._next_command(trial)
      if following and following[1] in self._written:
        self._failures.setdefault(
          trial.name, f"{from_root(following[1])} is not what was asked for"
        )
      if following and trial.name not in self._failures:
        self._start(trial, *following)

  def _start(
    self, trial: Trial, command: Command, output: pathlib.Path
  ) -> None:
    workdir = self._out / trial.name
    workdir.mkdir(parents=True, exist_ok=True)
    _say(f"start   {trial.name} ({output.name})")
    with (workdir / "log.txt").open("a") as log:
      now = datetime.datetime.now().isoformat(timespec="seconds")
      print(f"\n[{now}] {' '.join(command)}", file=log, flush=True)
      popen = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
      )
    busy = {process.slot for process in self._running}
    slot = min(set(range(self._jobs)) - busy)
    if hasattr(os, "sched_setaffinity"):
      os.sched_setaffinity(popen.pid, core_share(slot, self._jobs))
    self._running.append(_Process(trial, popen, output, time.monotonic(), slot))

  def _reap(self) -> None:
    for process in list(self._running):
      code = process.popen.poll()
      if code is None:
        continue
      self._running.remove(process)
      name, seconds = process.trial.name, time.monotonic() - process.start
      if code == 0 and read_json(process.output) is not None:
        self._written.add(process.output)
        _say(f"done    {name} ({process.output.name}, {seconds:.0f} s)")
        continue
      log = self._out / name / "log.txt"
      reason = last_error(log.read_text(errors="replace"))
      self._failures[name] = (
        f"exit code {code}: {reason} (see {from_root(log)})"
      )
      _say(f"FAILED  {name}: {self._failures[name]}")

  def _stop(self) -> None:
    """Ends what is running; checkpoints make it resumable."""
    for process in self._running:
      process.popen.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in self._running:
      try:
        process.popen.wait(max(0.0, deadline - time.monotonic()))
      except subprocess.TimeoutExpired:
        process.popen.kill()
        process.popen.wait()
    self._running.clear()

  def _show_status(self) -> None:
    if time.monotonic() - self._last_status < STATUS_SECONDS:
      return
    self._last_status = time.monotonic()
    for process in self._running:
      name, config = process.trial.name, self._config(process.trial)
      records = metrics.read(epath.Path(self._out / name))
      rows = [row for row in records if row["kind"] == "train"]
      if process.output.name != workdir_lib.RESULT:
        doing = f"making {process.output.name}"
      elif rows:
        loss = rows[-1]["loss"]
        shown = "not finite" if loss is None else f"{loss:.3f}"
        doing = f"step {rows[-1]['step']} of {config.train.steps}, loss {shown}"
      else:
        doing = "compiling"
      seconds = time.monotonic() - process.start
      _say(f"running {name}: {doing}, {seconds:.0f} s")

  def run(self) -> int:
    """Runs what is missing; returns the exit code."""
    for trial in self._plan({}):
      self._config(trial)  # a wrong definition fails before anything runs
    self._check_rows()
    start = time.monotonic()
    code = 0
    try:
      with _interrupt_on_terminate():
        while True:
          self._reap()
          self._start_more()
          if not self._running:
            break
          if self._budget and time.monotonic() - start > self._budget:
            _say(f"stopped: the budget of {self._budget:.0f} s is used up")
            code = 3
            break
          self._show_status()
          time.sleep(self._poll_seconds)
    except KeyboardInterrupt:
      _say("stopped: interrupted")
      code = 130
    finally:
      self._stop()
    records = self.records()
    for record in records:
      if record.status == FAILED:
        _say(f"FAILED  {record.trial.name}: {record.message}")
        code = code or 1
      elif record.status == LEFT:
        _say(f"left    {record.trial.name}")
    if code in (3, 130):
      _say("the same command continues from here")
    return code


def _say(line: str) -> None:
  print(line, flush=True)


@contextlib.contextmanager
def _interrupt_on_terminate() -> Iterator[None]:
  """SIGTERM acts like Ctrl-C, so that no child outlives the runner.

  Ctrl-C's own handler is set, too: a shell's background job ignores SIGINT.
  """

  def interrupt(*_):
    raise KeyboardInterrupt

  numbers = (signal.SIGINT, signal.SIGTERM)
  before = [signal.signal(number, interrupt) for number in numbers]
  try:
    yield
  finally:
    for number, handler in zip(numbers, before, strict=True):
      signal.signal(number, handler)


def arguments(
  name: str, scales: tuple[str, ...], argv: Sequence[str] | None
) -> argparse.Namespace:
  """The flags of every experiment's command."""
  parser = argparse.ArgumentParser(f"python -m experiments.{name}.run")
  parser.add_argument("--scale", choices=scales, default=scales[0])
  parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
  parser.add_argument("--budget", type=float, help="seconds; default: no end")
  parser.add_argument(
    "--rows",
    default="",
    help="run only these rows of the tables, comma-separated; report all",
  )
  parser.add_argument(
    "--out",
    type=pathlib.Path,
    help="folder of the trials and of the report (default: runs/...)",
  )
  parser.add_argument(
    "--report", type=pathlib.Path, help="folder of the report, if not --out"
  )
  parser.add_argument(
    "--data",
    default="data",
    help="folder of the data sets (wikitext2/), seen from the repository",
  )
  flags = parser.parse_args(argv)
  flags.out = flags.out or ROOT / "runs" / f"{name}-{flags.scale}"
  flags.report = flags.report or flags.out
  return flags


def main(
  name: str,
  plans: Mapping[str, Callable[[], Plan]],
  report: Callable[[Sequence[Record], pathlib.Path, str], None],
  argv: Sequence[str] | None = None,
  prepare: Callable[[argparse.Namespace], None] = lambda flags: None,
) -> int:
  """An experiment's command: runs the plan of `--scale`, reports, exit code.

  `report(records, folder, scale)`; `prepare` makes the data.
  """
  flags = arguments(name, tuple(plans), argv)
  try:
    files.check_folder(str(flags.out), "out")
    files.check_folder(str(flags.report), "report")
    for flag in ("jobs", "budget"):
      value = getattr(flags, flag)
      if value is not None and value <= 0:
        raise ConfigError(f"--{flag}={value:g} must be positive")
    prepare(flags)
    runner = Runner(
      plans[flags.scale](),
      flags.out,
      jobs=flags.jobs,
      budget=flags.budget,
      rows=flags.rows.split(",") if flags.rows else (),
    )
    code = runner.run()
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  report(runner.records(), flags.report, flags.scale)
  return code
