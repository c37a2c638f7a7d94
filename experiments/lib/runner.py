"""Runs an experiment's trials as subprocesses and skips what is done.

A trial is done when its folder has a result.json with the trial's own config
and every evaluation it asks for; anything else is (re)started, and the
trainer resumes from its last checkpoint.  So the same command runs, continues
or reprints an experiment.  A trial without a result in its folder is also done
if the experiment's published results.json has it with all evaluations: models
are not published, so a missing evaluation requires training again.  A failing
trial is reported and does not stop the others; at the budget's end or on Ctrl-C
the running ones are ended and what is left is listed.

Exit codes: 0 all done (of --rows, if given), 1 a trial failed, 2 wrong command
line or data, 3 the budget ended first, 130 Ctrl-C.
"""

import argparse
import contextlib
import dataclasses
import datetime
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from experiments.lib import results
from experiments.lib.results import DONE, FAILED, LEFT, Record, read_json
from experiments.lib.trials import (
  ROOT,
  Evaluation,
  Plan,
  Trial,
  is_same,
  resolve,
)
from hope_jax.config import Config, ConfigError
from hope_jax.runs import files
from hope_jax.runs import workdir as workdir_lib
from hope_jax.training import metrics

Command = list[str]
GRACE_SECONDS = 20.0  # from asking a process to end to killing it
STATUS_SECONDS = 20.0  # between two status lines


@dataclasses.dataclass
class _Process:
  trial: Trial
  popen: subprocess.Popen
  output: pathlib.Path  # exists when the command has succeeded
  start: float
  slot: int  # which of the jobs it is


def last_error(log: str) -> str:
  """The last line of a log that names an error, else the last line."""
  lines = log.strip().splitlines() or ["nothing was printed"]
  names_error = re.compile(r"error: |[\w.]*(Error|Exception)\b").match
  return (list(filter(names_error, lines)) or lines)[-1]


def from_root(path: pathlib.Path) -> pathlib.Path:
  """`path` relative to ROOT, where the processes run, if it is inside of it:
  published files should not name folders outside of the repository."""
  return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def core_share(slot: int, jobs: int) -> set[int]:
  """The cores of one of `jobs` processes; disjoint if there are enough of them.

  Two processes whose thread pools both span all cores slow each other down.
  """
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < jobs:
    return set(cores)
  return set(cores[slot * len(cores) // jobs : (slot + 1) * len(cores) // jobs])


def package_command(name: str) -> Command:
  """The package's command `name`."""
  return [sys.executable, "-m", f"hope_jax.{name}"]


def _output(workdir: pathlib.Path, evaluation: Evaluation) -> pathlib.Path:
  """The file of an evaluation."""
  return workdir / f"evaluate_{evaluation.label}.json"


def _flag(value: Any) -> str:
  """A value as ml_collections reads it from a command line."""
  return repr(value) if isinstance(value, tuple | list) else str(value)


class Runner:
  """Runs the trials of `plan` below `out`, at most `jobs` at a time; only those
  of `rows`, if any are named.  Trials in the file `published` count as done."""

  def __init__(
    self,
    plan: Plan,
    out: pathlib.Path,
    *,
    jobs: int = 1,
    budget: float | None = None,
    rows: Sequence[str] = (),
    published: pathlib.Path | None = None,
    command: Callable[[str], Command] = package_command,
    poll_seconds: float = 0.5,
  ):
    self._plan, self._out = plan, out.resolve()
    self._jobs, self._budget, self._rows = jobs, budget, rows
    self._command, self._poll_seconds = command, poll_seconds
    self._file = published
    self._published = results.read(published) if published else {}
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

  def _folder(self, trial: Trial) -> Record | None:
    """What the trial's folder holds, unchecked; None without a result."""
    workdir = self._out / trial.name
    result = read_json(workdir / workdir_lib.RESULT)
    if result is None:
      return None
    evaluations = {
      evaluation.label: read_json(_output(workdir, evaluation)) or {}
      for evaluation in trial.evaluations
    }
    return Record(trial, LEFT, result, evaluations, "", workdir)

  def _problem(self, trial: Trial, result: Mapping[str, Any]) -> str:
    """Why a result cannot be the trial's; empty if it can."""
    if not is_same(result.get("config", {}), self._config(trial)):
      return "the result of another config"
    for name in ("valid_loss", "test_loss"):
      if not isinstance(result.get(name), float | int):
        return (
          f"a result whose {name} is no finite number (it has diverged, or the"
          " file is damaged)"
        )
    return ""

  def _found(self, trial: Trial) -> Record | None:
    """The trial's result and its sound evaluations at the last step, from its
    folder or else from the published file."""
    own = self._folder(trial)
    found = own or self._published.get(results.key(trial))
    if found is None or found.result is None:
      return None
    problem = self._problem(trial, found.result)
    if problem:
      at, advice = self._file, "--fresh trains it again"
      if own:
        at, advice = own.workdir, "remove it or choose another --out"
      assert at is not None
      self._failures[trial.name] = f"{from_root(at)} holds {problem}: {advice}"
      return None
    done = {}
    for label in (evaluation.label for evaluation in trial.evaluations):
      scores = found.evaluations.get(label)
      is_sound = scores and scores.get("loss", 0.0) is not None
      if scores and is_sound and scores.get("step") == self._steps(trial):
        done[label] = scores
    if not own and len(done) < len(trial.evaluations):
      return None  # they need the model
    return found._replace(trial=trial, evaluations=done)

  def _steps(self, trial: Trial) -> int:
    return self._config(trial).train.steps

  def _next_command(self, trial: Trial) -> tuple[Command, pathlib.Path] | None:
    """The trial's next command and the file it must leave; None when done."""
    workdir = self._out / trial.name
    shown = from_root(workdir)
    found = self._found(trial)
    if found is None:
      flags = [
        f"--config.{field}={_flag(value)}"
        for field, value in trial.fields().items()
      ]
      config = f"--config={trial.config}:{trial.mode}"
      command = [*self._command("train"), config, f"--workdir={shown}", *flags]
      return command, workdir / workdir_lib.RESULT
    for evaluation in trial.evaluations:
      if evaluation.label not in found.evaluations:
        output = _output(shown, evaluation)
        flags = [f"--workdir={shown}", f"--output={output}"]
        command = self._command(evaluation.command)
        command = [*command, *flags, *evaluation.flags]
        return command, _output(workdir, evaluation)
    return None

  def records(self) -> list[Record]:
    """All trials that the plan names so far, with their state on disk."""
    records = []
    for trial in self._plan(self._results()):
      workdir = self._out / trial.name
      found = self._found(trial) or Record(trial, LEFT, None, {}, "", workdir)
      message = self._failures.get(trial.name, "")
      is_done = len(found.evaluations) == len(trial.evaluations)
      if message:
        found = found._replace(status=FAILED, message=message)
      elif found.result and is_done:
        found = found._replace(status=DONE)
        if not found.origin:  # found in the folder
          found = found._replace(
            curves=results.curves(workdir), origin=results.origin(workdir)
          )
      records.append(found)
    return records

  def _results(self) -> dict[str, dict[str, Any] | None]:
    """Results as a plan sees them, repeated until the plan adds no trial."""
    seen: dict[str, dict[str, Any] | None] = {}
    while True:
      names = len(seen)
      for trial in self._plan(seen):
        if trial.name not in seen:
          found = self._found(trial)
          if found or trial.name in self._failures:
            seen[trial.name] = found.result if found else None
      if len(seen) == names:
        return seen

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
    is_training = output.name == workdir_lib.RESULT
    if self._file and is_training and results.key(trial) in self._published:
      lacking = "lacks an evaluation of it, which needs the model"
      _say(f"        {from_root(self._file)} {lacking}")
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
    "--fresh",
    action="store_true",
    help="train also what the experiment's results.json has",
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
  *,
  folder: str = "results",
) -> int:
  """An experiment's command: runs the plan of `--scale`, reports, exit code.

  Calls `report(records, folder, scale)`; `prepare` makes the data; `folder` of
  the experiment's folder holds the published results.
  """
  flags = arguments(name, tuple(plans), argv)
  try:
    files.check_folder(str(flags.out), "out")
    files.check_folder(str(flags.report), "report")
    for flag in ("jobs", "budget"):
      value = getattr(flags, flag)
      if value is not None and value <= 0:
        raise ConfigError(f"--{flag}={value:g} must be positive")
    results.read(flags.report / results.NAME)  # fails now if damaged
    published = ROOT / "experiments" / name / folder / results.NAME
    prepare(flags)
    runner = Runner(
      plans[flags.scale](),
      flags.out,
      jobs=flags.jobs,
      budget=flags.budget,
      rows=flags.rows.split(",") if flags.rows else (),
      published=None if flags.fresh else published,
    )
    code = runner.run()
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  report(runner.records(), flags.report, flags.scale)
  return code
