"""Several processes of one run: they agree at the start, none waits for ever.

Every second, each process writes a sign of life, with its current step, to the
key-value store of jax.distributed, and reads those of the others.  If one is
silent for too long, has ended or holds up a step, the whole run ends with a
line that names it and the exit code `interruption.RESUMABLE`.

With one process, or before `initialize`, nothing here waits or communicates.
"""

import contextlib
import faulthandler
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from hope_jax.config import ConfigError, Json
from hope_jax.runs.interruption import RESUMABLE

T = TypeVar("T")

ARRIVAL_SECONDS = 300  # for which the first process waits for the last one
BEAT_SECONDS = 1.0  # between two signs of life
SUSPECT_SECONDS = 10.0  # of silence allowed once a collective has failed
_PREFIX = "hope_jax"
AGAIN = "run the same command again to resume"


class _Group:
  """This process's view of the others."""

  def __init__(self, client: Any, index: int, count: int, seconds: float):
    self.client, self.index, self.count = client, index, count
    self.seconds = seconds
    self.calls = 0  # calls of `share`; they number its keys
    self.hosts = [""] * count
    self.step, self.since = 0, time.monotonic()  # steps of this session
    self.hang_seconds = 0.0
    self.is_suspicious = self.is_silent = self.is_over = False
    now = time.monotonic()
    self.answered = now  # when the store last answered
    self.beats = [(0, 0)] * count  # number and step in each last sign
    self.seen = [now] * count  # when it came

  def name(self, index: int) -> str:
    return f"process {index} of {self.count} ({self.hosts[index]})"

  def exchange(self, number: int) -> dict[int, str]:
    """Gives a sign of life, reads the others'; returns who ended, and why."""
    sign = json.dumps([number, self.step])
    self.client.key_value_set(
      f"{_PREFIX}/alive/{self.index}", sign, allow_overwrite=True
    )
    found = self.client.key_value_dir_get(f"{_PREFIX}/alive")
    gone = self.client.key_value_dir_get(f"{_PREFIX}/gone")
    now = time.monotonic()
    self.answered = now
    for index, value in _by_process(found).items():
      beat = tuple(json.loads(value))
      if beat != self.beats[index]:
        self.beats[index], self.seen[index] = beat, now
    return _by_process(gone)

  def lost(self, gone: dict[int, str]) -> str | None:
    """Why the run cannot continue; None if it can."""
    now = time.monotonic()
    limit = self.seconds
    if self.is_suspicious:
      limit = min(limit, SUSPECT_SECONDS)
    others = [i for i in range(self.count) if i != self.index]
    for index in others:
      if index in gone:
        reason = gone[index]
        is_loss = reason.startswith("process ")  # of a third process
        return reason if is_loss else f"{self.name(index)} ended: {reason}"
    if self.index and now - self.answered > limit:
      return f"{self.name(0)} does not answer any more"
    for index in others:
      if now - self.seen[index] > limit and now - self.answered < limit:
        return (
          f"{self.name(index)} gave no sign of life for {limit:.0f} s: it died,"
          " hangs, or its network does"
        )
    return self._hung(now)

  def _hung(self, now: float) -> str | None:
    """Why a step takes too long, with the process that holds it up."""
    steps = [step for _, step in self.beats]
    steps[self.index] = self.step
    is_compiling = min(steps) < 2
    if is_compiling or not 0 < self.hang_seconds < now - self.since:
      return None
    silence = [now - seen for seen in self.seen]
    silence[self.index] = 0.0
    quiet = max(range(self.count), key=silence.__getitem__)
    behind = min(range(self.count), key=steps.__getitem__)
    if silence[quiet] > 5 * BEAT_SECONDS:
      reason = f"{self.name(quiet)} gives no sign of life"
    elif steps[behind] < max(steps):
      reason = (
        f"{self.name(behind)} is {max(steps) - steps[behind]} steps behind"
      )
    else:
      reason = "every process is at it"
    if behind == self.index or steps[behind] == max(steps):
      faulthandler.dump_traceback(file=2)
    return (
      f"a step took longer than {self.hang_seconds:g} s (train.hang_seconds):"
      f" {reason}"
    )


_group: _Group | None = None


def _by_process(found: list[tuple[str, str]]) -> dict[int, str]:
  return {int(key.rsplit("/", 1)[1]): value for key, value in found}


def initialize(seconds: float, fail: Callable[[str, int], NoReturn]) -> None:
  """Joins the other processes, which the cluster's environment names.

  From here on, the loss of one calls `fail(message, code)` in a separate
  thread.  A process that gives no sign of life for `seconds` counts as lost.

  Raises:
    ConfigError: the environment does not say who the others are.
  """
  global _group
  import jax
  from orbax.checkpoint import multihost

  try:
    jax.distributed.initialize(
      initialization_timeout=ARRIVAL_SECONDS,
      # Longer than `seconds`: it ends this process with a stack trace.
      heartbeat_timeout_seconds=int(100 + 4 * seconds),
    )
  except ValueError as error:
    raise ConfigError(
      f"--multihost: {error} Start one process per host under SLURM, Open MPI,"
      " Kubernetes or on a TPU pod, or set JAX_COORDINATOR_ADDRESS"
    ) from error
  if jax.process_count() == 1:
    return
  group = _Group(
    multihost.get_jax_distributed_client(),
    jax.process_index(),
    jax.process_count(),
    seconds,
  )
  group.hosts = ["host not known yet"] * group.count
  gone: dict[int, str] = {}

  def beat() -> None:
    number = 0
    while not group.is_over:
      number += 1
      if not group.is_silent:
        with contextlib.suppress(Exception):  # `watch` counts how long
          gone.update(group.exchange(number))
      time.sleep(BEAT_SECONDS)

  def watch() -> None:
    while not group.is_over:
      reason = None if group.is_silent else group.lost(gone)
      if reason and not group.is_over:
        fail(f"{reason}; {AGAIN}", RESUMABLE)
      time.sleep(BEAT_SECONDS / 2)

  _group = group
  for target in (beat, watch):
    threading.Thread(target=target, name=target.__name__, daemon=True).start()
  group.hosts = share(socket.gethostname())


def is_alone() -> bool:
  """Whether this process is the whole run."""
  return _group is None


def is_first() -> bool:
  """Whether this is the process that prints and writes for all."""
  return _group is None or _group.index == 0


def share(value: str) -> list[str]:
  """The values that all processes pass, in the order of the processes."""
  group = _group
  if group is None:
    return [value]
  group.calls += 1
  here = f"{_PREFIX}/shared/{group.calls}"
  group.client.key_value_set(f"{here}/{group.index}", value)
  return [_wait_for(group, f"{here}/{i}") for i in range(group.count)]


def _wait_for(group: _Group, key: str) -> str:
  """The value of a key, once it is there; `watch` bounds the wait."""
  while True:
    try:
      return group.client.blocking_key_value_get(key, 1000)
    except Exception as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        # The store is gone.  Give `watch` the time to report it.
        time.sleep(BEAT_SECONDS)


def agree(action: Callable[[], T]) -> T:
  """The result of `action`; a `ConfigError` in any process is raised in all.

  So no process waits for one that refused to start.
  """
  if _group is None:
    return action()
  value, problem = None, ""
  try:
    value = action()
  except ConfigError as error:
    problem = str(error)
  problems = share(problem)
  if problem:
    raise ConfigError(problem)
  for index, text in enumerate(problems):
    if text:
      raise ConfigError(f"{_group.name(index)}: {text}")
  return value  # type: ignore[return-value]


def from_first(action: Callable[[], Any]) -> Any:
  """The JSON value that `action` returns in process 0, or its `ConfigError`."""
  if _group is None:
    return action()
  value = agree(lambda: None if _group and _group.index else action())
  return json.loads(share(json.dumps(value))[0])


def check_same(values: Json) -> None:
  """`ConfigError` unless all processes give the same `values` (JSON)."""
  if _group is None:
    return
  first, *others = [json.loads(text) for text in share(json.dumps(values))]
  for index, theirs in enumerate(others, 1):
    for name in first | theirs:
      a, b = first.get(name), theirs.get(name)
      if a != b:
        raise ConfigError(
          f"{_group.name(index)} has {name}={b!r}, process 0 has {a!r}: start"
          " all processes with the same command, code and data"
        )


def at_step(hang_seconds: float) -> None:
  """To be called when this process begins its next step.

  Once all processes have compiled the step, one that takes longer than
  `hang_seconds` ends the run (0: never).
  """
  if _group is not None:
    _group.since, _group.hang_seconds = time.monotonic(), hang_seconds
    _group.step += 1


def silence(is_silent: bool) -> None:
  """Turns off the signs of life while this process's parent is stopped."""
  if _group is not None:
    _group.is_silent = is_silent
    _group.answered = time.monotonic()


def explain() -> None:
  """To be called after an unexpected error; does not return if the cause is
  the loss of another process, which `watch` then reports."""
  if _group is not None:
    _group.is_suspicious = True
    time.sleep(SUSPECT_SECONDS + 3 * BEAT_SECONDS)
    while _group.is_silent or _group.is_over:  # `watch` is about to end this
      time.sleep(BEAT_SECONDS)


def finish() -> None:
  """Waits until all processes have called it, then stops watching them."""
  if _group is not None:
    share("finished")
    _group.is_over = True


def leave(reason: str) -> None:
  """Tells the others that this process ends, and why."""
  group = _group
  if group is None:
    return
  if not group.is_over:
    group.is_over = True
    with contextlib.suppress(Exception):  # the store is gone already
      reason = reason.removesuffix(f"; {AGAIN}")
      group.client.key_value_set(f"{_PREFIX}/gone/{group.index}", reason)
  if group.index == 0:  # it holds the store: its end would abort the others
    time.sleep(3 * BEAT_SECONDS)
