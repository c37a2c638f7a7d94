"""Stopping a run without losing its work.

The first SIGINT (Ctrl-C) or SIGTERM (a scheduler, a preempted machine) lets
the loop finish its step and save a checkpoint; a second one stops at once.
With several processes, jax's preemption service agrees on one step.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

RESUMABLE = 75  # the machine is wanted elsewhere: run the command again
CODES = {signal.SIGINT: 130, signal.SIGTERM: RESUMABLE}


class Interrupted(KeyboardInterrupt):
  """The run was asked to stop, and its state is saved; with an exit code."""

  def __init__(self, message: str, code: int):
    super().__init__(message)
    self.code = code


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], int]]:
  """Yields should_stop(step), to be asked by every process at every step; it
  answers 0 or the exit code to stop with."""
  if jax.process_count() > 1:
    yield (
      lambda step: (
        RESUMABLE if multihost_utils.reached_preemption_sync_point(step) else 0
      )
    )
    return
  if threading.current_thread() is not threading.main_thread():
    yield lambda step: 0  # only the main thread hears signals
    return
  heard = []

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

  old = {number: signal.signal(number, handle) for number in CODES}
  try:
    yield lambda step: CODES[heard[0]] if heard else 0
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
