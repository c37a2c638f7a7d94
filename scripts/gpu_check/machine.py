"""What the results were measured on, in one row."""

import datetime
import os
import platform
import subprocess
from collections.abc import Iterator

import jax

from scripts.gpu_check.plan import Row

_QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm"


def rows(tiny: bool = False) -> Iterator[Row]:
  """The first device, versions, flags and the commit."""
  device = jax.devices()[0]
  limit = (device.memory_stats() or {}).get("bytes_limit")
  yield {
    "row": "machine",
    "device": device.device_kind,
    "platform": device.platform,
    "sizes": "toy" if tiny else "full",
    "GiB for jax": None if limit is None else limit / 2**30,
    "nvidia-smi": _said(
      "nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"
    ),
    "CPU cores": os.cpu_count(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    "commit": _said("git", "rev-parse", "--short", "HEAD"),
    "date": datetime.date.today().isoformat(),
  }


def _said(*command: str) -> str:
  """The output of a command; empty if it is missing or fails."""
  try:
    found = subprocess.run(command, capture_output=True, text=True, timeout=20)
  except (OSError, subprocess.TimeoutExpired):
    return ""
  return found.stdout.strip() if found.returncode == 0 else ""
