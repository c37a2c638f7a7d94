"""One layer's memory against attention, by length (`benchmark_memory.py`).

Eight heads of 128 as in the 340M models, chunks of 64, float32 inputs, JAX's
default precision of products; as many sequences as make 32,768 tokens, at least
one.  XLA's attention, in float32, keeps T x T scores; for cuDNN's kernel q, k
and v are rounded to bfloat16 first.

With length "titans_pytorch": a Titans layer against that package's
(`benchmark_titans_pytorch.py`), where it is installed.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.lib import timing
from scripts import benchmark_memory as memory
from scripts import benchmark_titans_pytorch as pytorch
from scripts.gpu_check import training
from scripts.gpu_check.plan import Row, first_line


class Sizes(NamedTuple):
  """Sizes of the layers: tokens of a batch, heads, their width, C."""

  tokens: int
  heads: int
  dim: int
  chunk: int
  width: int  # of the product that measures the peak
  rounds: int


FULL, TINY = Sizes(32768, 8, 128, 64, 8192, 5), Sizes(64, 1, 8, 16, 256, 1)


def rows(length: int | str, tiny: bool = False) -> Iterator[Row]:
  """A row for every layer and implementation, attention first."""
  if isinstance(length, str):
    yield from _against_pytorch(tiny)
    return
  sizes = TINY if tiny else FULL
  batch = max(1, sizes.tokens // length)
  x = memory.make_tokens(batch, sizes.heads, length, sizes.dim)
  rates = memory.measure_rates(sizes.width)
  bases: Row = {}
  for layer, implementation in _variants(tiny):
    chunk = 0 if layer == "attention" else sizes.chunk
    row: Row = {
      "row": f"{layer} {implementation} {length}",
      "layer": layer,
      "implementation": implementation,
      "B": batch,
      "T": length,
      "C": chunk,
    }
    if implementation == "cudnn" and jax.default_backend() != "gpu":
      yield {**row, "note": "left out: cuDNN is for GPUs"}
      continue
    variant = memory.Variant(layer, implementation, chunk)
    plain = variant._replace(implementation="xla")
    floor = memory.floor_seconds(plain, x, rates)
    for name, seconds in _timed(variant, x, sizes.rounds, row):
      row[f"{name} ms"] = 1e3 * seconds
      row[f"{name}, of floor"] = seconds / floor[name]
      if layer == "attention":
        bases.setdefault(name, seconds)  # cuDNN's where there is one
      elif name in bases:
        row[f"{name}, of attention"] = seconds / bases[name]
      if name == "both":
        row["tokens/s"] = batch * length / seconds
    yield row
  yield {
    "row": f"rates {length}",
    "table": "rates",
    "T": length,
    "product TFLOP/s": rates.product / 1e12,
    "copy GB/s": rates.copy / 1e9,
  }


def _variants(tiny: bool) -> list[tuple[str, str]]:
  """(layer, implementation), the most important first."""
  found = [("attention", "cudnn")]
  kernels = memory.KERNELS.get(jax.default_backend(), ())
  layers = ("titans", "hope", "linear_rule", "projections")
  for layer in layers[::2] if tiny else layers:
    found.append((layer, "xla"))
    if layer in kernels:
      found.append((layer, f"pallas_{jax.default_backend()}"))
  return [*found, ("attention", "xla")]


def _cudnn(_: Any, x: memory.Tokens) -> jax.Array:
  q, k, v = (y.swapaxes(1, 2).astype(jnp.bfloat16) for y in (x.q, x.k, x.v))
  return jax.nn.dot_product_attention(
    q, k, v, is_causal=True, implementation="cudnn"
  )


def _timed(
  variant: memory.Variant, x: memory.Tokens, rounds: int, row: Row
) -> Iterator[tuple[str, float]]:
  """(pass, median seconds) of what fits; for the rest, `row` gets a note."""
  heads, dim = x.q.shape[1], x.q.shape[-1]
  initial = memory.initial_state(variant.layer, heads, dim)
  is_cudnn = variant.implementation == "cudnn"
  run: Callable = _cudnn if is_cudnn else memory.make_layer(*variant)
  limit = training.bytes_limit()
  for name, function in memory.passes(run).items():
    try:
      compiled = jax.jit(function).lower(initial, x).compile()
      analysis = compiled.memory_analysis()
      needed = 0 if analysis is None else analysis.temp_size_in_bytes
      if limit and needed > limit:
        raise MemoryError(f"needs {needed / training.GIB:.0f} GiB")
      call = functools.partial(compiled, initial, x)
      yield name, timing.medians(timing.in_turn({0: call}, rounds))[0]
    except Exception as error:  # of one variant; others go on
      row[f"{name} note"] = first_line(error)
      return


def _against_pytorch(tiny: bool) -> Iterator[Row]:
  row: Row = {"row": "titans_pytorch", "table": "titans_pytorch"}
  if importlib.util.find_spec("titans_pytorch") is None:
    yield {**row, "note": "left out: titans_pytorch is not installed"}
    return
  shape, rounds = ((1, 32), 1) if tiny else ((8, 1024), 7)
  for chunk in (16,) if tiny else (16, 64):
    config = pytorch.make_config(chunk)
    size = (*shape, config.width)
    calls = {
      "hope_jax": pytorch.ours(config, size),
      "hope_jax, chunk reads": pytorch.ours(pytorch.chunk_reads(config), size),
      pytorch.BASE: pytorch.theirs(config, size, chunk),
      f"{pytorch.BASE}, batch": pytorch.theirs(config, size, None),
    }
    seconds = timing.medians(timing.in_turn(calls, rounds))
    for name, taken in seconds.items():
      yield {
        "row": f"{name} {chunk}",
        "table": "titans_pytorch",
        "layer": name,
        "C": chunk,
        "ms": 1e3 * taken,
        "ratio": seconds[pytorch.BASE] / taken,
      }
