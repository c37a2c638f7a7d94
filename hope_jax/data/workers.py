"""Child processes that read data and end quietly with their parent.

A parent that is killed cannot end its children, so each of them waits for its
parent's end.  A terminal's Ctrl-C and a scheduler's SIGTERM also reach the
children, which block them: the parent decides what to do.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

_QUIET = "ignore:resource_tracker:UserWarning"


@contextlib.contextmanager
def starting() -> Iterator[None]:
  """Inside, SIGINT and SIGTERM are blocked in the processes that this thread,
  or a thread that it starts, creates."""
  # The tracker need not warn of the semaphores of a killed parent: it removes
  # them.
  sys.warnoptions.append(_QUIET)
  try:
    resource_tracker.ensure_running()
  finally:
    sys.warnoptions.remove(_QUIET)
  blocked = {signal.SIGINT, signal.SIGTERM}
  before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent() -> None:
  """Called in a child: ends it as soon as its parent has ended."""
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None, "not a child process"
  parent.join()  # until the system closes the parent's end of a pipe
  os._exit(1)
