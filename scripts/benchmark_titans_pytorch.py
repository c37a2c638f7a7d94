"""One Titans layer against titans-pytorch's `NeuralMemory`, forward + backward.

python -m scripts.benchmark_titans_pytorch [--chunks=16,64] [--rounds=7]

Both are whole layers [B, T, D] -> [B, T, D] with the same heads and the same
memory per head (an MLP of two matrices of head dim x head dim, momentum and
forgetting); gradients are of the input and of all parameters.  Rows:

  hope_jax                 the layer as it is trained here: convolutions, every
                           token reads what the tokens before it wrote
  hope_jax, chunk reads    no convolution, reads see whole chunks only, as
                           NeuralMemory's do
  titans-pytorch           batch_size = chunk_size: gradients at each chunk's
                           first state, as Titans and hope_jax take them
  titans-pytorch, batch    its default: all gradients at the sequence's first
                           state, so that nothing is sequential

Ratios are of tokens/s, to `titans-pytorch`.  Needs the extra `bench`.
"""

import argparse
import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs import _models
from experiments.lib import tables, timing
from hope_jax.config import ModelConfig, from_config_dict
from hope_jax.models import titans

BASE = "titans-pytorch"


def make_config(chunk: int) -> ModelConfig:
  group = _models.model(
    "titans", "3p9m", memory_chunks=(chunk, chunk), cms_chunks=()
  )
  return from_config_dict({"model": group}).model


def chunk_reads(config: ModelConfig) -> ModelConfig:
  """The config with the reads of NeuralMemory, and without convolutions."""
  memory = dataclasses.replace(config.memory, read="chunk")
  return dataclasses.replace(config, memory=memory, conv_window=0)


def optional(name: str) -> Any:
  """A module of the extra `bench`."""
  return importlib.import_module(name)


def ours(config: ModelConfig, shape: tuple[int, ...]) -> Callable[[], Any]:
  """Compiles loss and gradients of one layer."""
  layer = titans.DeepMemory(config)
  x = jax.random.normal(jax.random.key(0), shape)
  params = nn.unbox(jax.jit(layer.init)(jax.random.key(1), x)["params"])

  def loss(params: Any, x: jax.Array) -> jax.Array:
    out: Any = layer.apply({"params": params}, x)
    return jnp.mean(jnp.square(out.y))

  step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  return functools.partial(step.lower(params, x).compile(), params, x)


def theirs(
  config: ModelConfig, shape: tuple[int, ...], batch_size: int | None
) -> Callable[[], Any]:
  """The same for NeuralMemory; here its memory has no residual and no norm."""
  torch, titans_pytorch = optional("torch"), optional("titans_pytorch")
  dim = config.head_dim
  layer = titans_pytorch.NeuralMemory(
    dim=config.width,
    heads=config.num_heads,
    dim_head=dim,
    chunk_size=config.memory.chunk_length,
    batch_size=batch_size,
    model=titans_pytorch.MemoryMLP(dim=dim, depth=2, expansion_factor=1.0),
    mem_model_norm_add_residual=False,
  )
  x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
  device = "cuda" if torch.cuda.is_available() else "cpu"
  layer, x = layer.to(device), x.to(device).requires_grad_()

  def step() -> float:
    layer.zero_grad()
    y, _ = layer(x)
    loss = y.square().mean()
    loss.backward()
    return loss.item()  # waits for a GPU

  return step


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser("python -m scripts.benchmark_titans_pytorch")
  parser.add_argument("--chunks", default="16,64")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--length", type=int, default=1024)
  parser.add_argument("--rounds", type=int, default=7)
  flags = parser.parse_args(argv)
  try:
    torch = optional("torch")
  except ImportError:
    parser.error("titans-pytorch is not installed: pip install '.[bench]'")
  lines = []
  for chunk in map(int, flags.chunks.split(",")):
    config = make_config(chunk)
    shape = flags.batch, flags.length, config.width
    calls = {
      "hope_jax": ours(config, shape),
      "hope_jax, chunk reads": ours(chunk_reads(config), shape),
      BASE: theirs(config, shape, chunk),
      f"{BASE}, batch": theirs(config, shape, None),
    }
    seconds = timing.medians(timing.in_turn(calls, flags.rounds))
    for name, taken in seconds.items():
      lines.append(
        {
          "layer": name,
          "C": str(chunk),
          "ms": f"{taken * 1e3:,.0f}",
          "tokens/s": f"{flags.batch * flags.length / taken:,.0f}",
          "ratio": f"{seconds[BASE] / taken:.2f}",
        }
      )
  print(tables.markdown(lines))
  print(
    f"{flags.batch} x {flags.length} tokens, width {config.width},"
    f" {config.num_heads} heads, float32, median of {flags.rounds} in turn;"
    f" {timing.machine()}, {jax.devices()[0].device_kind}, jax"
    f" {jax.__version__}, torch {torch.__version__}"
  )


if __name__ == "__main__":
  main()
