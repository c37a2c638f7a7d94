"""Several processes of one run: what they agree on, and that none waits."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from hope_jax.runs import processes

pytestmark = pytest.mark.optimized

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CONFIG = """
import ml_collections

def get_config():
  return ml_collections.ConfigDict({
    "model": {"width": 16, "num_layers": 1, "num_heads": 1, "ffn_hidden": 16},
    "data": {"sequence_length": 32, "batch_size": 2},
    "train": {"steps": 1000000, "log_every": 50, "eval_every": 0,
              "checkpoint_every": 0},
    "eval": {"batches": 1, "batch_size": 2}, "opt": {},
  })
"""

# ---------------------------------------------- one process's view of others


@pytest.fixture
def clock(monkeypatch):
  """The time, to be moved by hand."""
  now = [1000.0]
  monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
  return now


class Store:
  """A key-value store of several processes."""

  def __init__(self):
    self.values = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    assert allow_overwrite or key not in self.values
    self.values[key] = value

  def key_value_dir_get(self, key):
    return [(k, v) for k, v in self.values.items() if k.startswith(key + "/")]


def group(store, index, count=3, seconds=60.0):
  found = processes._Group(store, index, count, seconds)
  found.hosts = [f"host{i}" for i in range(count)]
  return found


def test_silent_process_is_named_after_its_time(clock):
  store = Store()
  ours, theirs, third = (group(store, i) for i in range(3))
  for number in range(1, 50):
    third.exchange(number)
    if number < 5:
      theirs.exchange(number)
    ours.exchange(number)
    clock[0] += 1.0
    assert ours.lost({}) is None
  clock[0] += 13.0
  third.exchange(50)
  ours.exchange(50)
  assert ours.lost({}) is None  # 59 seconds
  clock[0] += 2.0
  ours.exchange(51)
  assert "process 1 of 3 (host1) gave no sign of life for 60 s" in ours.lost({})


def test_suspicion_shortens_the_time(clock):
  ours = group(Store(), 0, count=2)
  clock[0] += 12.0
  ours.exchange(1)
  assert ours.lost({}) is None
  ours.is_suspicious = True
  assert "process 1 of 2 (host1) gave no sign of life for 10 s" in ours.lost({})


def test_store_that_does_not_answer_is_the_first_process(clock):
  ours = group(Store(), 1, count=2)
  clock[0] += 59.0
  assert ours.lost({}) is None
  clock[0] += 2.0
  assert ours.lost({}) == "process 0 of 2 (host0) does not answer any more"
  assert group(Store(), 0, count=1).lost({}) is None


def test_reason_of_a_process_that_ended_is_passed_on():
  ours = group(Store(), 0)
  found = ours.lost({2: "the disk is full"})
  assert found == "process 2 of 3 (host2) ended: the disk is full"
  assert ours.lost({1: found}) == found  # not once more in other words


def test_step_that_hangs_names_who_is_behind(clock, capfd):
  store = Store()
  ours, theirs = (group(store, i, count=2) for i in range(2))
  for each in (ours, theirs):
    each.hang_seconds = 10.0

  def exchange(number):
    for each in (theirs, ours):
      each.exchange(number)

  ours.step, theirs.step = 2, 1  # which still compiles
  exchange(1)
  clock[0] += 11.0
  exchange(2)
  assert ours.lost({}) is None
  ours.step, theirs.step, ours.since = 9, 7, clock[0]
  exchange(3)
  assert ours.lost({}) is None
  clock[0] += 11.0
  exchange(4)
  assert ours.lost({}).endswith("process 1 of 2 (host1) is 2 steps behind")
  assert not capfd.readouterr().err
  theirs.step = 9
  exchange(5)
  assert ours.lost({}).endswith("every process is at it")
  assert "test_step_that_hangs" in capfd.readouterr().err  # all stacks
  clock[0] += 6.0
  ours.exchange(6)
  assert "process 1 of 2 (host1) gives no sign of life" in ours.lost({})


def test_unexpected_error_leaves_the_last_word_to_the_watch(monkeypatch):
  ours = group(Store(), 0, count=2)
  ours.is_over = True  # `watch` has given the reason, and ends the process
  waits = []

  def sleep(seconds):
    waits.append(seconds)
    if len(waits) == 9:
      raise TimeoutError

  monkeypatch.setattr(processes, "_group", ours)
  monkeypatch.setattr(processes.time, "sleep", sleep)
  with pytest.raises(TimeoutError):
    processes.explain()


def test_alone_there_is_nothing_to_agree_on():
  assert processes.share("a") == ["a"] and processes.agree(lambda: 3) == 3
  assert processes.from_first(lambda: {"b": 1}) == {"b": 1}
  processes.check_same({"c": 1})
  processes.at_step(0.0)
  processes.finish()
  processes.leave("no reason")
  assert processes.is_first() and processes.is_alone()


# ------------------------------------------------------- two real processes


class Pair:
  """Two processes of one run, over gloo."""

  def __init__(self, folder, *flags, second=(), cwd_of_second="."):
    (folder / "small.py").write_text(CONFIG)
    self.folder = folder
    self.cwd = [folder, folder / cwd_of_second]
    with socket.socket() as free:
      free.bind(("localhost", 0))
      port = free.getsockname()[1]
    self.out = [folder / f"{i}.out" for i in range(2)]
    self.children = [
      self._start(i, port, [*flags, *(second if i else ())]) for i in range(2)
    ]

  def _start(self, index, port, flags):
    environment = {
      "PYTHONPATH": str(REPOSITORY),
      "JAX_PLATFORMS": "cpu",
      "SLURM_JOB_ID": "1",
      "SLURM_STEP_NODELIST": "localhost",
      "SLURM_NTASKS": "2",
      "SLURM_PROCID": str(index),
      "SLURM_LOCALID": str(index),
      "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    }
    with self.out[index].open("w") as file:
      return subprocess.Popen(
        [
          *(sys.executable, "-m", "hope_jax.train", "--multihost"),
          f"--config={self.folder / 'small.py'}",
          f"--workdir={self.folder / 'run'}",
          *flags,
        ],
        cwd=self.cwd[index],
        env=os.environ | environment,
        stdout=file,
        stderr=file,
      )

  def said(self, index):
    """The lines of a process, without those of gloo."""
    lines = self.out[index].read_text().splitlines()
    return [line for line in lines if "[Gloo]" not in line]

  def wait_for_step(self, number):
    while not any(f"step {number}/" in line for line in self.said(0)):
      assert self.codes() == [None, None], [self.said(i) for i in range(2)]
      time.sleep(0.05)

  def codes(self):
    return [child.poll() for child in self.children]

  def end(self):
    """The exit codes, and the errors that were said."""
    for child in self.children:
      child.wait(timeout=120)
    lines = [
      [line for line in self.said(i) if line.startswith("error: ")]
      for i in range(2)
    ]
    return self.codes(), lines


@pytest.fixture
def pair(tmp_path):
  """Starts pairs in one folder, and ends what is left of them."""
  started = []

  def start(*flags, **options):
    started.append(Pair(tmp_path, *flags, **options))
    return started[-1]

  yield start
  for each in started:
    for child in each.children:
      child.kill()


def test_processes_with_other_flags_both_refuse(pair):
  codes, errors = pair(second=["--config.opt.peak_lr=0.5"]).end()
  assert codes == [2, 2]
  assert errors[0] == errors[1] and len(errors[0]) == 1
  assert "has opt.peak_lr=0.5, process 0 has 0.001" in errors[0][0]


def test_missing_data_in_one_process_ends_both(pair, tmp_path):
  (tmp_path / "text.txt").write_text("To be, or not to be. " * 100)
  (tmp_path / "elsewhere").mkdir()  # where the second looks for the text
  both = pair("--config.data.path=text.txt", cwd_of_second="elsewhere")
  codes, errors = both.end()
  assert codes == [2, 2]
  assert [len(lines) for lines in errors] == [1, 1]
  assert re.search(r"process 1 of 2 \(.*text.txt", errors[0][0])
  assert "process 1" not in errors[1][0] and "text.txt" in errors[1][0]


def test_interrupt_saves_one_step_and_loss_of_a_process_ends_the_other(pair):
  both = pair()
  both.wait_for_step(50)
  for child in both.children:  # as Ctrl-C in a terminal
    child.send_signal(signal.SIGINT)
  codes, errors = both.end()
  assert codes == [130, 130] and errors[0] == errors[1]
  (step,) = [int(n) for n in re.findall(r"saved step (\d+)", errors[0][0])]
  checkpoints = both.folder / "run" / "checkpoints"
  assert [path.name for path in checkpoints.iterdir()] == [str(step)]

  both = pair()  # it goes on; one is killed
  both.wait_for_step(step // 50 * 50 + 100)
  both.children[1].kill()
  codes, errors = both.end()
  assert codes == [75, -signal.SIGKILL]
  assert "process 1 of 2" in errors[0][0] and "resume" in errors[0][0]
  assert len(errors[0]) == 1 and len(both.said(0)) < 30  # no stack traces

  both = pair()  # now the one that coordinates
  both.wait_for_step(step // 50 * 50 + 100)
  both.children[0].kill()
  codes, errors = both.end()
  assert codes == [-signal.SIGKILL, 75]
  assert "process 0 of the run" in errors[1][0] and len(errors[1]) == 1
  assert len(both.said(1)) < 10


@pytest.mark.slow
def test_stopped_process_and_locked_folder_end_both(pair):
  both = pair("--peer_seconds=8")
  both.wait_for_step(50)
  both.children[1].send_signal(signal.SIGTERM)  # one is enough
  codes, errors = both.end()
  assert codes == [75, 75] and "saved step" in errors[1][0]
  both = pair("--peer_seconds=8")
  both.wait_for_step(int(re.findall(r"\d+", errors[1][0])[0]) // 50 * 50 + 100)
  both.children[1].send_signal(signal.SIGSTOP)
  assert both.children[0].wait(timeout=120) == 75
  said = [line for line in both.said(0) if line.startswith("error: ")]
  assert len(said) == 1 and "process 1 of 2" in said[0]
  both.children[1].send_signal(signal.SIGCONT)
  assert both.children[1].wait(timeout=120) == 75


@pytest.mark.slow
def test_second_job_of_two_processes_is_refused_by_both(pair, tmp_path):
  from hope_jax.runs import workdir

  (tmp_path / "run").mkdir()
  with workdir.locked(tmp_path / "run"):
    codes, errors = pair().end()
  assert codes == [2, 2]
  assert all("another run trains in" in line for (line,) in errors)


# ------------------------------------------------------ the process around it

CHILD = """
import json, os, sys, time
from hope_jax.runs import supervisor
supervisor.supervise(lambda is_silent: None)
with open(sys.argv[1], "w") as file:
  file.write(str(os.getpid()))
for line in json.loads(sys.argv[2]):
  print(line, file=sys.stderr, flush=True)
end = sys.argv[3]
if end == "abort":
  os.abort()
time.sleep(60 if end == "wait" else 0)
sys.exit(int(end))
"""
FATAL = (
  "E1127 21:00:00.000000    123 coordination_service_agent.cc:289] Polled ...",
  "F1127 21:00:00.000000    123 client.h:80] Terminating process because the"
  " JAX distributed service detected fatal errors.",
  "*** Check failure stack trace: ***",
)


def supervised(tmp_path, lines, end):
  return subprocess.Popen(
    [sys.executable, "-c", CHILD, tmp_path / "pid", json.dumps(lines), end],
    env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize(
  ("lines", "end", "code", "said"),
  [
    (["a", "b"], "0", 0, ["a", "b"]),
    (["a"], "3", 3, ["a"]),
    (
      ["a", *FATAL],
      "abort",
      75,
      ["a", "error: process 0 of the run, .*resume"],
    ),
    (["a", "crash"], "abort", 134, ["a", "crash"]),  # of another kind
    (["a", FATAL[0], "b"], "1", 1, ["a", re.escape(FATAL[0]), "b"]),
    ([FATAL[0], "b", "error: why"], "75", 75, ["error: why"]),
  ],
)
def test_supervisor_passes_on_all_but_the_end_of_others(
  tmp_path, lines, end, code, said
):
  process = supervised(tmp_path, lines, end)
  _, err = process.communicate(timeout=60)
  assert process.returncode == code
  found = err.splitlines()
  assert len(found) == len(said), found
  for line, pattern in zip(found, said, strict=True):
    assert re.fullmatch(pattern, line)


def is_alive(pid):
  """Whether a process runs, on Linux; elsewhere zombies count, too."""
  try:
    os.kill(pid, 0)
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1][1] != "Z"
  except (ProcessLookupError, FileNotFoundError):
    return False


def test_supervised_process_ends_with_its_supervisor(tmp_path):
  process = supervised(tmp_path, [], "wait")
  pid = tmp_path / "pid"
  while not (pid.exists() and pid.read_text()):
    time.sleep(0.02)
  child = int(pid.read_text())
  assert is_alive(child)
  process.kill()
  process.communicate()
  for _ in range(500):
    if not is_alive(child):
      return
    time.sleep(0.02)
  raise AssertionError("the child outlived its parent")
