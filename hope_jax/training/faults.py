"""How a run reacts to faults: bad numbers, missing data, a hung step.

A step whose loss or gradient is not finite changes nothing (`step.py`) and is
counted.  This module decides when such steps, or a jump of the loss, end the
run or send it back to its last checkpoint.
"""

import collections
import contextlib
import faulthandler
import math
import queue
import statistics
import threading
from collections.abc import Generator, Iterator
from typing import Any

from hope_jax.config import Json, TrainConfig
from hope_jax.runs.errors import Diverged, NoData

_HISTORY = 50  # logged losses that a spike is measured against
_FEWEST = 5  # losses before a jump can be detected
_GRACE_SECONDS = 5.0  # for data workers to end


class Guard:
  """Watches the logged losses."""

  def __init__(self, config: TrainConfig, records: list[Json]):
    """`records`: those of earlier sessions."""
    self._config = config
    self._losses: collections.deque[float] = collections.deque(maxlen=_HISTORY)
    for record in records:
      loss = record["loss"] if record["kind"] == "train" else None
      if loss is not None and not self._is_jump(loss):
        self._losses.append(loss)
    self._rollbacks = sum(r["kind"] == "rollback" for r in records)

  def is_spike(self, *seen: tuple[int, dict[str, float]] | None) -> bool:
    """Whether to go back to the last checkpoint; raises `Diverged` to give up.

    `seen`: steps and their logged scalars, None for nothing new.
    """
    return any(self._is_spike(*each) for each in seen if each is not None)

  def _is_spike(self, step: int, values: dict[str, float]) -> bool:
    limit = self._config.max_bad_steps
    if values["bad_in_a_row"] >= limit:
      raise Diverged(
        f"loss or gradient was not finite in {int(values['bad_in_a_row'])}"
        f" steps up to step {step}; the parameters are those from before, the"
        " checkpoints are intact: lower opt.peak_lr, or look at the data"
      )
    loss = values["loss"]
    if not math.isfinite(loss):
      return False
    if not self._is_jump(loss):
      self._losses.append(loss)
      return False
    self._rollbacks += 1
    if self._rollbacks > self._config.max_rollbacks:
      raise Diverged(
        f"the loss jumped to {loss:.4g} at step {step}, the"
        f" {self._rollbacks}th time; the checkpoints are intact: lower"
        " opt.peak_lr, or look at the data"
      )
    return True

  def _is_jump(self, loss: float) -> bool:
    """Whether `loss` is far above the last ones; False for the first few."""
    factor = self._config.rollback_factor
    if not factor or len(self._losses) < _FEWEST:
      return False
    return loss > factor * statistics.median(self._losses)


def check_end(
  config: TrainConfig,
  *,
  losses: dict[str, float | None],
  bad: int,
  bad_in_a_row: int,
) -> None:
  """`Diverged` if a run that made all its steps has no valid result.

  `losses` are by split, None where not finite; `bad` and `bad_in_a_row` are as
  in `TrainState`.  A single bad step at the end is skipped like any other one.
  """
  for split, loss in losses.items():
    if loss is None or not math.isfinite(loss):
      raise Diverged(
        f"the {split} loss after the last step ({config.steps}) is not finite;"
        " there is no result: lower opt.peak_lr, or look at the data"
      )
  if bad_in_a_row > 1 or bad == config.steps:
    raise Diverged(
      f"loss or gradient was not finite in the last {bad_in_a_row} of"
      f" {config.steps} steps; there is no result: lower opt.peak_lr, or look"
      " at the data"
    )


def with_timeout(
  batches: Iterator[Any], seconds: float, ahead: int = 1
) -> Generator[Any]:
  """`batches`, up to `ahead` of them made in advance by a thread; `NoData` if
  one takes longer than `seconds`, or making it fails.

  Closing this generator also closes `batches`.
  """
  box: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=ahead)
  is_over = threading.Event()

  def put(kind: str, value: Any) -> None:
    while not is_over.is_set():
      with contextlib.suppress(queue.Full):
        box.put((kind, value), timeout=1.0)
        return

  def read() -> None:
    try:
      for batch in batches:
        put("batch", batch)
        if is_over.is_set():
          return
      put("end", None)
    except Exception as error:
      put("error", error)
    finally:
      getattr(batches, "close", lambda: None)()  # ends its processes

  # A daemon: a read that hangs must not keep the process from ending.
  thread = threading.Thread(target=read, name="batches", daemon=True)
  thread.start()
  try:
    while True:
      try:
        kind, value = box.get(timeout=seconds)
      except queue.Empty as error:
        raise NoData(
          f"no batch for {seconds:g} s (data.timeout): the storage hangs, or a"
          " data worker; run the same command again to resume"
        ) from error
      if kind == "end":
        return
      if kind == "error":
        reason = str(value).strip().splitlines() or [type(value).__name__]
        raise NoData(f"reading the data failed: {reason[-1]}") from value
      yield value
  finally:
    is_over.set()
    thread.join(timeout=_GRACE_SECONDS)


class Watchdog:
  """Dumps all threads' stacks on stderr when a step takes too long."""

  def __init__(self, seconds: float):
    self._seconds = seconds

  def step(self) -> None:
    """To be called when a step begins; restarts the timer."""
    if self._seconds:
      faulthandler.dump_traceback_later(self._seconds, repeat=True, file=2)

  @contextlib.contextmanager
  def watch(self) -> Iterator[None]:
    """Steps are watched inside the block; its end stops the timer."""
    try:
      yield
    finally:
      faulthandler.cancel_dump_traceback_later()
