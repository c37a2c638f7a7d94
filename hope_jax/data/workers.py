"""Child processes that read data: they end with their parent, without noise.

A parent that is killed cannot end its children, so each of them waits for its
parent's end.  A terminal's Ctrl-C and a scheduler's SIGTERM reach the children,
too, but what is to be done then is the parent's to say.
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
  """Processes that the calling thread, or a thread that it begins here, starts
  do not hear SIGINT and SIGTERM."""
  # It removes the semaphores of a parent that was killed: nothing to warn of.
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
