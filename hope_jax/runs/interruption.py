"""Stopping a run without losing its work.

The first SIGINT (Ctrl-C) or SIGTERM (a scheduler, a preempted machine) lets
the loop finish its step and save a checkpoint; a second one stops at once.
With several processes, JAX's preemption service makes all of them stop at the
same step, whichever received the signal.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

RESUMABLE = 75  # stopped from outside: run the same command again
CODES = {signal.SIGINT: 130, signal.SIGTERM: RESUMABLE}


class Interrupted(KeyboardInterrupt):
  """The run was asked to stop and saved its state; has the exit code."""

  def __init__(self, message: str, code: int):
    super().__init__(message)
    self.code = code


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], int]]:
  """Yields should_stop(step), which every process calls at every step; it
  returns 0, or the exit code to stop with."""
  import jax
  from jax.experimental import multihost_utils

  several = jax.process_count() > 1
  heard: list[int] = []

  def should_stop(step: int) -> int:
    if several and not multihost_utils.reached_preemption_sync_point(step):
      return 0
    if heard:
      return CODES[signal.Signals(heard[0])]
    return RESUMABLE if several else 0

  if threading.current_thread() is not threading.main_thread():
    yield should_stop  # only the main thread receives signals
    return

  def handle(number: int, frame: Any) -> None:
    del frame
    if heard:
      raise KeyboardInterrupt
    heard.append(number)
    print(
      "stopping after this step (again: stop at once)",
      file=sys.stderr,
      flush=True,
    )
    if several:  # what the preemption service listens to, in every process
      signal.raise_signal(signal.SIGTERM)

  # With several processes, the service handles SIGTERM.
  watched = [signal.SIGINT] if several else list(CODES)
  old = {number: signal.signal(number, handle) for number in watched}
  try:
    yield should_stop
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
