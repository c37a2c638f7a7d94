"""What a command prints on stderr before its results: what it will do, and
what it waits for."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from hope_jax.runs import processes

# Between two lines where stderr is not a terminal; it doubles each time.
_FIRST_SECONDS, _LONGEST_SECONDS = 5.0, 60.0


def say(line: str) -> None:
  """Prints one line at once; of several processes, only the first does."""
  if processes.is_first():
    print(line, file=sys.stderr, flush=True)


class Waiting:
  """Prints what is waited for, and how long it has taken so far.

  On a terminal one line counts the seconds; elsewhere lines are printed at
  growing intervals.  Nothing is printed if it ends within `patience` seconds.
  """

  def __init__(self, what: str, patience: float = 0.0):
    self._what, self._patience = what, patience
    self._begin = time.monotonic()
    self._over = threading.Event()
    self._said = threading.Lock()
    self._has_begun = False
    if not patience:
      self._show()
    # A daemon: it must not keep a failing process alive.
    self._thread = threading.Thread(target=self._count, daemon=True)
    self._thread.start()

  def _show(self, end: str = "") -> None:
    with self._said:
      if (self._over.is_set() and not end) or not processes.is_first():
        return
      seconds = time.monotonic() - self._begin
      text = f"{self._what} ..."
      if self._has_begun or self._patience:
        text += f" {seconds:.0f} s"
      self._has_begun = True
      on_terminal = sys.stderr.isatty()
      before = "\r" if on_terminal else ""
      after = "\n" if end or not on_terminal else ""
      print(f"{before}{text}{end}", end=after, file=sys.stderr, flush=True)

  def _count(self) -> None:
    if self._over.wait(self._patience):
      return
    every = _FIRST_SECONDS
    if self._patience:
      self._show()
    while not self._over.wait(1.0 if sys.stderr.isatty() else every):
      every = min(2 * every, _LONGEST_SECONDS)
      self._show()

  def end(self) -> None:
    """Ends the wait; a second call does nothing."""
    if not self._over.is_set():
      self._over.set()
      self._thread.join()
      if self._has_begun:
        self._show(end=", done")


@contextlib.contextmanager
def waiting(what: str, patience: float = 0.0) -> Iterator[None]:
  """A `Waiting` during the block; an error ends it without a last line."""
  wait = Waiting(what, patience)
  try:
    yield
  except BaseException:
    wait._has_begun = False
    raise
  finally:
    wait.end()
