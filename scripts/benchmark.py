"""Training speed of whole steps: every model against Transformer++.

python -m scripts.benchmark [--models=titans,hope] [--rounds=15]

One step is loss, gradient and AdamW update at 3.9M parameters (width 256, 4
layers, 4 heads, equal parameters), 8 sequences of 1,024 tokens.  All models
are compiled first (without the persistent cache: cold), then take a step
each in turn, so that whatever else the machine does hits all of them; speed
is from the median step.  FLOPs are counted from the jaxpr, loss and gradient.
`scripts/benchmark_memory.py` times memories and kernels by themselves.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from configs import _models
from experiments import tables, timing
from hope_jax.config import Config, from_config_dict
from hope_jax.training import flops, sharding, step

BASE = "transformer"


class Entry(NamedTuple):
  """A compiled training step, its state and batch; compile in seconds."""

  config: Config
  run: Any
  state: Any
  batch: dict[str, jax.Array]
  compile_seconds: float


def make_config(name: str, flags: argparse.Namespace) -> Config:
  """The benchmark's config of one model; `_twin` has its inner rates off."""
  model, twin, _ = name.partition("_twin")
  group = _models.model(
    model,
    "3p9m",
    memory_chunks=(flags.memory_chunk, flags.projection_chunk),
    cms_chunks=(flags.length // 8, flags.length // 2, 0),
    inner_rates="off" if twin else "on",
    dtype=flags.dtype,
  )
  data = {"sequence_length": flags.length, "batch_size": flags.batch}
  return from_config_dict({"model": group, "data": data})


def build(config: Config, mesh: Any) -> Entry:
  """Compiles the training step, and times that."""
  data = config.data
  compiled = step.build(config, mesh)
  state = compiled.init(jax.random.key(0))
  shape = (data.batch_size, data.sequence_length + 1)
  tokens = np.random.default_rng(0).integers(
    0, config.model.vocab_size, shape, dtype=np.int32
  )
  batch = {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "weights": np.ones((shape[0], shape[1] - 1), np.float32),
  }
  rows = sharding.process_rows(mesh, shape[0])
  batch = sharding.put_batch(batch, mesh, shape[0], rows)
  start = time.perf_counter()
  run = compiled.train_step.lower(state, batch).compile()
  return Entry(config, run, state, batch, time.perf_counter() - start)


def measure(entries: dict[str, Entry], rounds: int) -> dict[str, list[float]]:
  """Seconds per step, the models taking turns; the first round warms up."""
  states = {name: entry.state for name, entry in entries.items()}

  def advance(name: str) -> Any:
    entry = entries[name]
    states[name], metrics = entry.run(states[name], entry.batch)
    return metrics

  calls = {name: functools.partial(advance, name) for name in entries}
  return timing.in_turn(calls, rounds)


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser("python -m scripts.benchmark")
  parser.add_argument(
    "--models",
    default="transformer_conv,titans,hope,hope_twin",
    help=f"beside {BASE}: of {', '.join(_models.NAMES)}, or with _twin",
  )
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--length", type=int, default=1024)
  parser.add_argument("--memory_chunk", type=int, default=16)
  parser.add_argument("--projection_chunk", type=int, default=64)
  parser.add_argument("--dtype", default="float32")
  flags = parser.parse_args(argv)
  jax.config.update("jax_enable_compilation_cache", False)

  names = [BASE, *(name for name in flags.models.split(",") if name != BASE)]
  configs = {name: make_config(name, flags) for name in names}
  mesh = sharding.make_mesh(configs[BASE].mesh)
  with sharding.activate(mesh):
    entries = {name: build(configs[name], mesh) for name in names}
    seconds = measure(entries, flags.rounds)

  tokens = flags.batch * flags.length
  median = {name: statistics.median(seconds[name]) for name in names}
  work = {name: flops.per_token(configs[name]) for name in names}
  lines = []
  for name, entry in entries.items():
    low, high = np.percentile(seconds[name], [25, 75])
    parameters = step.count_parameters(entry.state.params)
    lines.append(
      {
        "model": name,
        "parameters": f"{parameters:,}",
        "tokens/s": f"{tokens / median[name]:,.0f}",
        "quartiles": f"{tokens / high:,.0f} - {tokens / low:,.0f}",
        f"of {BASE}": f"{median[BASE] / median[name]:.2f}",
        "MFLOP/token": f"{work[name] / 1e6:.2f}",
        "FLOP ratio": f"{work[name] / work[BASE]:.2f}",
        "cold compile s": f"{entry.compile_seconds:.1f}",
      }
    )
  print(tables.markdown(lines))
  print(
    f"{flags.batch} x {flags.length} tokens, {flags.dtype}, median of"
    f" {flags.rounds} steps in turn; {tables.machine()},"
    f" {jax.devices()[0].device_kind}, jax {jax.__version__}"
  )


if __name__ == "__main__":
  main()
