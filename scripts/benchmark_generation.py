"""State bytes and decoding speed by context length: memories against a cache.

python -m scripts.benchmark_generation [--models=hope,titans,transformer]

Measures the size of a sequence's state and the decoding speed after contexts of
1K to 1M tokens: single tokens one after the other, batch 1, median of several
blocks.  No context is read: a memory's state has the same size everywhere, and
of a Transformer's cache, which is as long as the context, only the length
matters.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from configs import _models
from experiments.lib import plots, tables, timing
from hope_jax.config import ModelConfig, from_config_dict
from hope_jax.inference import generation
from hope_jax.models import language_model

LENGTHS = tuple(1 << n for n in range(10, 21, 2))
TOKENS = 16  # of a timed block; fewer after long caches


def make_config(name: str, size: str, length: int) -> ModelConfig:
  """A model whose attention, if any, holds `length` tokens."""
  group = _models.model(
    name, size, memory_chunks=(16, 64), cms_chunks=(64, 256, 0)
  )
  data = {"sequence_length": 1024}
  config = from_config_dict({"model": group, "data": data}).model
  return dataclasses.replace(config, context_length=length)


def block_length(config: ModelConfig) -> int:
  """Tokens of a timed block; fewer where each takes seconds."""
  if not config.has_attention:
    return TOKENS
  return max(1, min(TOKENS, (1 << 18) // config.context_length))


def at(state: Any, place: int) -> Any:
  """`state`, with attention caches as if `place` tokens had been read."""

  def move(path: Any, x: jax.Array) -> jax.Array:
    is_cache = jax.tree_util.keystr(path).endswith(".mixer.position")
    return jnp.full_like(x, place) if is_cache else x

  return jax.tree_util.tree_map_with_path(move, state)


def tokens_per_second(params: Any, config: ModelConfig, rounds: int) -> float:
  """Decoding speed after a context of `config.context_length` tokens."""
  count = block_length(config)
  place = config.context_length - count
  state = at(language_model.init_state(config, 1), place)
  states = jax.tree.map(lambda x: x[None], state)
  logits = jnp.zeros((1, config.vocab_size))
  seconds = []
  for _ in range(rounds + 1):  # the first one compiles
    start = time.perf_counter()
    tokens, _, states = generation.decode(
      params,
      states,
      logits,
      jax.random.split(jax.random.key(0), 1),
      config=config,
      count=count,
      sampling=generation.Sampling(),
      vocab_size=config.vocab_size,
    )
    jax.block_until_ready(tokens)
    seconds.append(time.perf_counter() - start)
    if config.has_attention:
      states = jax.vmap(lambda state: at(state, place))(states)
  return count / statistics.median(seconds[1:])


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser("python -m scripts.benchmark_generation")
  parser.add_argument("--models", default="transformer,titans,hope")
  parser.add_argument("--size", default="tiny")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--longest", type=int, default=LENGTHS[-1])
  parser.add_argument("--plot", type=plots.output, help="PNG file")
  flags = parser.parse_args(argv)
  names = flags.models.split(",")
  lengths = [length for length in LENGTHS if length <= flags.longest]
  lines, curves = [], {name: [] for name in names}
  for name in names:
    config = make_config(name, flags.size, lengths[0])
    model = language_model.LanguageModel(config)
    tokens = np.zeros((1, 8), np.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))["params"]
    for length in lengths:
      config = make_config(name, flags.size, length)
      size = generation.state_bytes(config)
      speed = tokens_per_second(params, config, flags.rounds)
      curves[name].append(speed)
      lines.append(
        {
          "model": name,
          "context": f"{length:,}",
          "state MiB": f"{size / 2**20:,.2f}",
          "tokens/s": f"{speed:,.2f}",
        }
      )
  print(tables.markdown(lines))
  print(f"\n{timing.machine()}, batch 1, median of {flags.rounds}")
  if flags.plot:
    plots.lines(
      flags.plot,
      {name: (lengths, values) for name, values in curves.items()},
      title="Decoding speed by context",
      xlabel="tokens of context",
      ylabel="tokens/s",
    )


if __name__ == "__main__":
  main()
