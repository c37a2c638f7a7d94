"""Data workers of a real process, which is interrupted and killed."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

SHARED = pathlib.Path("/dev/shm")
SCRIPT = """
import multiprocessing, os, signal, sys

from hope_jax.config import Config, DataConfig
from hope_jax.data import pipeline
from hope_jax.config import ModelConfig

if __name__ == "__main__":
  config = Config(
    model=ModelConfig(vocab_size=65),
    data=DataConfig(kind="mqar", sequence_length=32),
  )
  source = pipeline.load(config)["train"]
  batches = pipeline.TrainBatches(source, 4, (0, 4), 10**6)
  ahead = pipeline.prefetch(batches, 0, workers=2)
  next(ahead), next(ahead)
  heard = []
  signal.signal(signal.SIGINT, lambda *_: heard.append(1))
  print(*[child.pid for child in multiprocessing.active_children()], flush=True)
  if sys.argv[1] == "exit":
    os._exit(3)
  while not heard:
    next(ahead)
  for _ in range(100):
    next(ahead)
  print("went on", flush=True)
  while True:
    next(ahead)
"""


def wait_until(is_so, seconds=120):
  end = time.monotonic() + seconds
  while not is_so():
    assert time.monotonic() < end, "waited in vain"
    time.sleep(0.05)


def is_running(pid: str) -> bool:
  try:
    state = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return False
  return state.rpartition(") ")[2][0] != "Z"


@pytest.mark.skipif(not SHARED.is_dir(), reason="looks into /proc and /dev/shm")
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_workers_end_with_their_parent_and_leave_nothing(end, tmp_path):
  """Also: a terminal's Ctrl-C, which all processes hear, is the parent's."""
  before = set(SHARED.iterdir())
  (tmp_path / "script.py").write_text(SCRIPT)
  errors = tmp_path / "errors"
  with (
    errors.open("wb") as stderr,
    subprocess.Popen(
      [sys.executable, tmp_path / "script.py", end],
      env={**os.environ, "PYTHONPATH": os.getcwd()},
      stdout=subprocess.PIPE,
      stderr=stderr,
      text=True,
      start_new_session=True,
    ) as parent,
  ):
    assert parent.stdout is not None
    workers = parent.stdout.readline().split()
    made = set(SHARED.iterdir()) - before
    try:
      if end == "kill":
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.stdout.readline() == "went on\n"
        assert all(map(is_running, workers))
        parent.kill()
      wait_until(lambda: not any(map(is_running, workers)))
      assert parent.wait() == (3 if end == "exit" else -signal.SIGKILL)
    finally:
      for pid in filter(is_running, [*workers, str(parent.pid)]):
        os.kill(int(pid), signal.SIGKILL)
  assert len(workers) == 2
  assert not [path for path in made if path.name.startswith("psm_")]
  wait_until(lambda: not made & set(SHARED.iterdir()))
  assert errors.read_text() == ""
