"""Training speed of whole steps: every model against Transformer++.

python -m scripts.benchmark [--configs=shakespeare] [--models=titans,hope]

The configs are those of the result tables, unchanged: `shakespeare` (8 x 256
tokens), `wikitext2` (2 x 1,024) and `books` (1 x 4,096) of `configs/`; and
`3p9m`, width 256 at 8 x 1,024.  `hope_twin` has its inner rates off; the CMS
levels of `hope_associative` learn by the associative signal (an ablation);
`hope_ffn` has a plain FFN in their place; any model can have these endings.
One step is loss, gradient and AdamW update; parameters are matched.  The models
of a config are compiled first (cold, without the persistent cache), then take
turns step by step, so that other load on the machine affects all of them;
speed is from the median step.  FLOPs are counted from the jaxpr, forward and
backward.
`scripts/benchmark_memory.py` times memories and kernels by themselves.
"""

import argparse
import dataclasses
import functools
import importlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from configs import _models
from experiments.lib import tables, timing
from hope_jax.analysis import flops
from hope_jax.config import Config, ModelConfig, from_config_dict
from hope_jax.training import sharding, step

CONFIGS = ("shakespeare", "wikitext2", "books", "3p9m")
MODELS = (
  "transformer_conv",
  "titans",
  "samba",
  "mamba2",
  "gated_deltanet",
  "hope",
  "hope_twin",
  "hope_associative",
)
BASE = "transformer"


class Entry(NamedTuple):
  """A compiled training step, its state and batch; compile in seconds."""

  config: Config
  run: Any
  state: Any
  batch: dict[str, jax.Array]
  compile_seconds: float


def _twin(model: ModelConfig) -> ModelConfig:
  return dataclasses.replace(model, inner_rates="off")


def _associative(model: ModelConfig) -> ModelConfig:
  cms = dataclasses.replace(model.cms, signal="associative")
  return dataclasses.replace(model, cms=cms)


def _ffn(model: ModelConfig) -> ModelConfig:
  cms = dataclasses.replace(model.cms, connection="none")
  return dataclasses.replace(model, cms=cms)


ENDINGS = {"_twin": _twin, "_associative": _associative, "_ffn": _ffn}
PACKED = 4  # documents of a sequence with --packed


def make_config(config: str, name: str, flags: argparse.Namespace) -> Config:
  """A config of one model, whose name may have one of `ENDINGS`."""
  ending = next((end for end in ENDINGS if name.endswith(end)), "")
  model = name.removesuffix(ending)
  if config == "3p9m":
    group = _models.model(
      model,
      config,
      memory_chunks=(64, 64),
      cms_chunks=(128, 512, 0),
      cms_signal="next_token",
    )
    data = {"sequence_length": 1024, "batch_size": 8}
    found = from_config_dict({"model": group, "data": data})
  else:
    module = importlib.import_module(f"configs.{config}")
    found = from_config_dict(module.get_config(model))
  changed = ENDINGS[ending](found.model) if ending else found.model
  size = {
    "batch_size": flags.batch or found.data.batch_size,
    "sequence_length": flags.length or found.data.sequence_length,
  }
  return dataclasses.replace(
    found,
    model=dataclasses.replace(changed, dtype=flags.dtype),
    data=dataclasses.replace(found.data, **size),
  )


def build(config: Config, mesh: Any, *, is_packed: bool = False) -> Entry:
  """Compiles the training step and times the compilation; sequences hold one
  document or, if `is_packed`, `PACKED` of them."""
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
  if is_packed:
    number = np.arange(data.sequence_length) * PACKED // data.sequence_length
    batch["segments"] = np.tile(number.astype(np.int32), (shape[0], 1))
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


def table(
  configs: Mapping[str, Config], rounds: int, *, is_packed: bool = False
) -> list[dict[str, str]]:
  """A line for each model: compiled, then timed in turn."""
  mesh = sharding.make_mesh(configs[BASE].mesh)
  with sharding.activate(mesh):
    entries = {
      name: build(config, mesh, is_packed=is_packed)
      for name, config in configs.items()
    }
    seconds = measure(entries, rounds)
  data = configs[BASE].data
  tokens = data.batch_size * data.sequence_length
  median = timing.medians(seconds)
  work = {name: flops.per_token(config) for name, config in configs.items()}
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
  return lines


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser("python -m scripts.benchmark")
  parser.add_argument(
    "--configs", default=",".join(CONFIGS), help=f"of {', '.join(CONFIGS)}"
  )
  parser.add_argument(
    "--models",
    default=",".join(MODELS),
    help=f"beside {BASE}: of {', '.join(_models.NAMES)}, or with one of"
    f" {', '.join(ENDINGS)}",
  )
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--batch", type=int, help="sequences, if not as it is")
  parser.add_argument("--length", type=int, help="tokens of each, likewise")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument(
    "--packed", action="store_true", help=f"{PACKED} documents a sequence"
  )
  flags = parser.parse_args(argv)
  for name in flags.configs.split(","):
    if name not in CONFIGS:
      parser.error(f"--configs={name} is not one of {', '.join(CONFIGS)}")
  jax.config.update("jax_enable_compilation_cache", False)

  names = [BASE, *(name for name in flags.models.split(",") if name != BASE)]
  for config in flags.configs.split(","):
    configs = {name: make_config(config, name, flags) for name in names}
    lines = table(configs, flags.rounds, is_packed=flags.packed)
    data = configs[BASE].data
    print(
      f"{config}: {data.batch_size} x {data.sequence_length:,} tokens,"
      f" {'packed, ' * flags.packed}{flags.dtype}, median of {flags.rounds}"
      " steps in turn;"
      f" {timing.machine()}, {jax.devices()[0].device_kind},"
      f" jax {jax.__version__}\n"
    )
    print(tables.markdown(lines), flush=True)


if __name__ == "__main__":
  main()
