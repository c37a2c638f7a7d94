"""Times of calls that take turns, so that disturbances affect all alike."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

Name = TypeVar("Name")


def in_turn(
  calls: Mapping[Name, Callable[[], Any]], rounds: int
) -> dict[Name, list[float]]:
  """Seconds of each call until its result is ready, after a warm-up round."""
  seconds: dict[Name, list[float]] = {name: [] for name in calls}
  for _ in range(rounds + 1):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      seconds[name].append(time.perf_counter() - start)
  return {name: times[1:] for name, times in seconds.items()}


def medians(seconds: Mapping[Name, list[float]]) -> dict[Name, float]:
  return {name: statistics.median(times) for name, times in seconds.items()}


def machine() -> str:
  """The machine of a measurement, in words."""
  return f"{os.cpu_count()} CPU cores, {platform.machine()}"
