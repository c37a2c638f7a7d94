"""What is done, in which order, and how long each part may take."""

import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]

KERNELS = ("absl", "numpy")
MODELS = (*KERNELS, "etils", "flax", "optax")


class Part(NamedTuple):
  """A group of jobs.

  Attributes:
    share: seconds of the whole; what a part does not use, later ones may.
    module: the module with its `rows`.
    needs: packages besides jax; if one is missing, the part is left out.
    together: whether its jobs, which time nothing, run at the same time.
  """

  share: float
  module: str
  needs: tuple[str, ...]
  together: bool = False


PARTS = {
  "kernels": Part(140, "scripts.gpu_check.kernels", KERNELS, together=True),
  "training": Part(230, "scripts.gpu_check.training", MODELS),
  "memories": Part(50, "scripts.gpu_check.memories", MODELS),
  "decoding": Part(70, "scripts.gpu_check.decoding", MODELS),
  "profile": Part(50, "scripts.gpu_check.profiling", MODELS),
}


class Job(NamedTuple):
  """A call of a part's `rows`.

  Attributes:
    name: name of the job, which begins with its part's.
    seconds: after which it is cut, unless its part's end comes first.
    arguments: of `rows`, as JSON can express them.
    after: a job whose last row is given to `rows` as `before` (None if it has
      none).
  """

  part: str
  name: str
  seconds: float
  arguments: dict[str, Any]
  after: str = ""


def first_line(error: Exception) -> str:
  """The type of an error and the first line of its message."""
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0][:300]}"


MACHINE_MODULE = "scripts.gpu_check.machine"
MACHINE = Job("machine", "machine", 60, {})

# Transformer++ is timed with both attentions: its own code asks for XLA's.
FIRST = ("hope", "transformer", "transformer_cudnn", "titans")
OTHERS = ("samba", "mamba2", "gated_deltanet", "gated_deltanet_xla")
LENGTHS = (4096, 32768)


def jobs(tiny: bool) -> list[Job]:
  """All jobs, the most valuable ones of a part first."""
  return [
    *_kernels(tiny),
    *_training(tiny),
    *_memories(tiny),
    *_decoding(tiny),
    Job("profile", "profile-hope", 150, {}, after=_training(tiny)[0].name),
  ]


def _kernels(tiny: bool) -> list[Job]:
  """By head size; 64 is last, for its backward kernel compiles for minutes."""
  found = []
  for dim in (16,) if tiny else (128, 64):
    for op, implementation in (
      ("linear_rule", "pallas_gpu"),
      ("linear_rule", "xla"),
      ("generalized_delta_rule", "xla"),
    ):
      name = f"kernels-{op}-{implementation}-{dim}"
      arguments = {"op": op, "implementation": implementation, "dim": dim}
      found.append(Job("kernels", name, 300, arguments))
  return found


def _training(tiny: bool) -> list[Job]:
  found, first_length = [], 0
  for length in (64,) if tiny else LENGTHS:
    for name in FIRST if tiny else FIRST + OTHERS:
      arguments = {"model": name, "length": length}
      seconds = 150 if name == "hope" else 60
      after = f"training-{name}-{first_length}" if first_length else ""
      job_name = f"training-{name}-{length}"
      found.append(Job("training", job_name, seconds, arguments, after))
    first_length = first_length or length
  return found


def _memories(tiny: bool) -> list[Job]:
  lengths = (64,) if tiny else (8192, 131072, 2048, 32768)
  found = [
    Job("memories", f"memories-{length}", 90, {"length": length})
    for length in lengths
  ]
  arguments = {"length": "titans_pytorch"}
  return [*found, Job("memories", "memories-titans_pytorch", 60, arguments)]


def _decoding(tiny: bool) -> list[Job]:
  places = (16, 64) if tiny else (1 << 10, 1 << 16)
  found = []
  for name in ("hope", "titans", "transformer"):
    arguments = {"model": name, "places": places}
    found.append(Job("decoding", f"decoding-{name}", 60, arguments))
  return found


def missing(part: str) -> list[str]:
  """The packages that a part needs and this Python does not have."""
  needed = ("jax", *PARTS[part].needs)
  return [name for name in needed if importlib.util.find_spec(name) is None]


def deadlines(parts: Sequence[str], seconds: float) -> dict[str, float]:
  """When each of `parts` has to end, in seconds from the first one's start, if
  they have `seconds` together."""
  total, passed, found = sum(PARTS[part].share for part in parts), 0.0, {}
  for part in parts:
    passed += PARTS[part].share
    found[part] = seconds * passed / total
  return found
