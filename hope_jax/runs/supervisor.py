"""The parent process of each process in a run of several.

When the process that coordinates a run dies, JAX ends every other one by
abort(), with a stack trace, which nothing inside that process can prevent.  So
the command runs as a child.  Its parent passes on signals and output, and turns
such an end into one line and the exit code that means "run the same command
again".

The child ends with its parent, when the pipe between them closes.  A parent
that is stopped (SIGSTOP) writes nothing to the pipe, and its child then gives
no signs of life.
"""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from hope_jax.runs import interruption
from hope_jax.runs.interruption import RESUMABLE

_PIPE = "HOPE_JAX_SUPERVISOR"  # the child's file descriptor of the pipe
_TICK_SECONDS = 1.0
_HELD_SECONDS = 20.0
# What the coordination service writes to stderr when a process is lost.
_TROUBLE = re.compile(
  r"[IWEF]\d{4} \S+ +\d+ (coordination_\w+|preemption_\w+|client)\.(cc|h):"
)
_FATAL = "JAX distributed service detected fatal errors"


def supervise(silence: Callable[[bool], None]) -> None:
  """Runs the command again as a child; returns only in the child.

  In the child, `silence(True)` is called while its parent is stopped,
  `silence(False)` while it runs.
  """
  number = os.environ.pop(_PIPE, None)
  if number is None:
    _run_child()
  pipe = int(number)  # type: ignore[arg-type]
  os.set_inheritable(pipe, False)
  threading.Thread(target=_follow, args=(pipe, silence), daemon=True).start()


def _follow(pipe: int, silence: Callable[[bool], None]) -> None:
  """Runs in the child, and ends it with its parent."""
  while True:
    ready, _, _ = select.select([pipe], [], [], 5 * _TICK_SECONDS)
    if ready and not os.read(pipe, 1):
      os._exit(RESUMABLE)
    silence(not ready)


def _run_child() -> NoReturn:
  theirs, mine = os.pipe()
  child = subprocess.Popen(
    sys.orig_argv,
    env=os.environ | {_PIPE: str(theirs)},
    pass_fds=(theirs,),
    start_new_session=True,  # Ctrl-C reaches it once, through this process
    stderr=subprocess.PIPE,
    text=True,
    errors="replace",
  )
  os.close(theirs)
  for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(each, lambda number, _: child.send_signal(number))
  relay = _Relay()

  def tick() -> None:
    while child.poll() is None:
      with contextlib.suppress(OSError):  # the child has just ended
        os.write(mine, b".")
      relay.flush_old()
      time.sleep(_TICK_SECONDS)

  threading.Thread(target=tick, daemon=True).start()
  assert child.stderr is not None
  for line in child.stderr:
    relay.add(line)
  code = child.wait()
  if code == -signal.SIGABRT and any(_FATAL in line for line in relay.held):
    reason = (
      "process 0 of the run, which coordinates it, is gone, or it counts this"
      " one as lost"
    )
    if any("RegisterTask" in line for line in relay.held):
      reason = "the other processes of the run did not come, or not in time"
    relay.held = [f"error: {reason}; run the same command again to resume\n"]
    code = RESUMABLE
  elif code in interruption.CODES.values():
    relay.held = []  # the run has printed its own error
  relay.flush()
  os._exit(code if code >= 0 else 128 - code)


class _Relay:
  """Passes on the child's stderr; from the first sign of trouble, it holds
  back all but the run's own errors for some seconds."""

  def __init__(self):
    self.held: list[str] = []
    self._since = 0.0
    self._lock = threading.Lock()

  def add(self, line: str) -> None:
    with self._lock:
      is_ours = line.startswith("error: ")
      if not is_ours and (self.held or _TROUBLE.match(line)):
        self._since = self._since if self.held else time.monotonic()
        self.held.append(line)
        return
      sys.stderr.write(line)
      sys.stderr.flush()

  def flush_old(self) -> None:
    if self.held and time.monotonic() - self._since > _HELD_SECONDS:
      self.flush()

  def flush(self) -> None:
    with self._lock:
      held, self.held = self.held, []
      sys.stderr.writelines(held)
      sys.stderr.flush()
