"""Training steps of the 340M models: speed, MFU, memory, compile time.

The recipe of `configs/_paper.py` (bfloat16, remat, its chunk lengths, the CMS
of Hope by the next token) at the largest batch that fits: 8, 4, 2 or 1; a batch
that the compiler's memory analysis rules out is not tried.  One step is loss,
gradient and AdamW update on random tokens.

A name may end in `_cudnn`: attention by cuDNN's kernel instead of XLA's, which
`hope_jax/models/attention.py` asks for; or in `_xla`: the linear rule without
its kernel.
"""

import contextlib
import dataclasses
import functools
import gc
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from configs import _paper
from hope_jax.analysis import flops
from hope_jax.config import Config, from_config_dict
from hope_jax.models import linear
from hope_jax.training import sharding, step
from scripts import benchmark
from scripts.gpu_check.plan import Row, first_line

GIB = 2**30
CUDNN = "cudnn, put in place of the model's"
ATTENTION = "xla, the model has no other", CUDNN
BATCHES = (8, 4, 2, 1)


class Limits(NamedTuple):
  """Seconds and steps of a measurement, whichever ends first."""

  seconds: float
  steps: int


FULL, TINY = Limits(15.0, 10), Limits(1.0, 2)
TOY = {  # fields of a model of --tiny: little to compile
  "memory_chunks": (16, 32),
  "cms_chunks": (32, 0, 0),
  "vocab_size": 64,
  "remat": "none",
}


def rows(
  model: str, length: int, before: Row | None = None, tiny: bool = False
) -> Iterator[Row]:
  """One row, three times: after compiling, after timing steps, with the MFU.

  before: the row of the same model at another length, from which the memory per
  token is known.
  """
  name = model.removesuffix("_cudnn").removesuffix("_xla")
  row: Row = {
    "row": f"{model} {length}",
    "model": name,
    "T": length,
    "attention": "-",
    "linear rule": "-",
  }
  config = make_config(model, length, 1, tiny)
  if config.model.has_attention:
    row["attention"] = ATTENTION[model.endswith("_cudnn")]
  if name in linear.VARIANTS or name == "mamba2":
    row["linear rule"] = config.model.memory.implementation
  if row["attention"] == CUDNN and jax.default_backend() != "gpu":
    yield {**row, "note": "left out: cuDNN is for GPUs"}
    return
  yield from _at_largest_batch(row, model, length, before, tiny)


def make_config(model: str, length: int, batch: int, tiny: bool) -> Config:
  """The recipe's model and optimizer on T `length`."""
  name = model.removesuffix("_cudnn").removesuffix("_xla")
  group = _toy(name, length) if tiny else _paper.model(name, "340m")
  if model.endswith("_xla"):
    group["memory"]["implementation"] = "xla"
  data = {"sequence_length": length, "batch_size": batch}
  return from_config_dict({"model": group, "data": data})


def _toy(name: str, length: int) -> Row:
  group = _paper.model(name, "tiny", **TOY)
  group["num_layers"] = 2
  group["memory"]["remat"] = "none"
  if name == "hope":
    group["memory"]["adaptive"] = ("k",)
    group["cms"]["outer_order"] = 1
  if "attention_window" in group:
    group["attention_window"] = length // 2
  return group


@contextlib.contextmanager
def attention(implementation: str) -> Iterator[None]:
  """Inside, `jax.nn`'s attention is cuDNN's if `implementation` is `CUDNN`."""
  before = jax.nn.dot_product_attention
  if implementation == CUDNN:
    jax.nn.dot_product_attention = functools.partial(
      before, implementation="cudnn"
    )
  try:
    yield
  finally:
    jax.nn.dot_product_attention = before


def _at_largest_batch(
  row: Row, model: str, length: int, before: Row | None, tiny: bool
) -> Iterator[Row]:
  limit, tried = bytes_limit(), []
  for batch in BATCHES:
    needed = predicted(before, batch * length)
    if limit and needed > limit:
      tried.append(f"{batch}: would need {needed / GIB:.0f} GiB")
      continue
    config = make_config(model, length, batch, tiny)
    failed, is_done = "", False
    try:
      with attention(row["attention"]):  # not when FLOPs are counted
        entry = build(config)
      before = program_memory(entry.run) | {"tokens": batch * length}
      row |= {"B": batch, "tried": list(tried), **before}
      row["compile s"] = entry.compile_seconds
      needed = predicted(before, batch * length)
      if limit and needed > limit:
        failed = f"needs {needed / GIB:.0f} GiB"
      else:
        yield dict(row)
        row |= timed(entry, TINY if tiny else FULL)[1]
        is_done = True
    except jax.errors.JaxRuntimeError as error:
      failed = first_line(error)[:120]
      if not is_out_of_memory(error):
        yield {**row, "pass": False, "error": failed}
        return
    entry = None  # frees the device memory that it holds
    gc.collect()
    if is_done:
      yield dict(row)
      yield row | mfu(config, row["tokens/s"])
      return
    tried.append(f"{batch}: {failed}")
  yield {**row, "tried": tried, "note": "no batch fits"}


def build(config: Config) -> benchmark.Entry:
  """The compiled step, on this one device."""
  mesh = sharding.one_device()
  with sharding.activate(mesh):
    return benchmark.build(config, mesh)


def is_out_of_memory(error: Exception) -> bool:
  """Whether the device has run out of memory."""
  words = "RESOURCE_EXHAUSTED", "out of memory", "Out of memory"
  return any(word in str(error) for word in words)


def bytes_limit() -> int:
  """Bytes of the device that JAX may take; 0: unknown (a CPU)."""
  return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def program_memory(program: Any) -> dict[str, float]:
  """GiB of a program's arguments and temporaries, as its compiler says."""
  analysis = program.memory_analysis()
  if analysis is None:
    return {"state GiB": 0.0, "temporary GiB": 0.0}
  return {
    "state GiB": analysis.argument_size_in_bytes / GIB,
    "temporary GiB": analysis.temp_size_in_bytes / GIB,
  }


def predicted(before: Row | None, tokens: int) -> float:
  """Bytes that a step of `tokens` tokens needs: `before`, with its temporaries
  scaled by tokens; 0 if there is no `before`."""
  if not before or "temporary GiB" not in before:
    return 0.0
  scale = tokens / before["tokens"]
  return GIB * (before["state GiB"] + scale * before["temporary GiB"])


def timed(entry: benchmark.Entry, limits: Limits) -> tuple[Any, Row]:
  """(state after, row): speed of a compiled step, after one to warm up, and the
  peak memory of this process.  `entry.state` is donated."""
  state, begin = entry.state, time.perf_counter()
  seconds, metrics = [], None
  while len(seconds) <= limits.steps:
    start = time.perf_counter()
    state, metrics = entry.run(state, entry.batch)
    jax.block_until_ready(metrics)
    seconds.append(time.perf_counter() - start)
    if len(seconds) > 1 and time.perf_counter() - begin > limits.seconds:
      break
  median = statistics.median(seconds[1:])
  data = entry.config.data
  loss = float(metrics.loss) if metrics else math.nan
  stats = jax.devices()[0].memory_stats() or {}
  peak = stats.get("peak_bytes_in_use")
  return state, {
    "parameters": step.count_parameters(state.params),
    "steps": len(seconds) - 1,
    "step ms": 1e3 * median,
    "tokens/s": data.batch_size * data.sequence_length / median,
    "peak GiB": None if peak is None else peak / GIB,
    "loss": loss if math.isfinite(loss) else None,
    "pass": math.isfinite(loss),
  }


def mfu(config: Config, tokens_per_second: float) -> Row:
  """FLOPs of a token, without recomputation, and the share of the peak."""
  config = dataclasses.replace(
    config, data=dataclasses.replace(config.data, batch_size=1)
  )
  work = flops.per_token(config)
  peak = flops.peak_flops(jax.devices()[0])
  return {
    "MFLOP/token": work / 1e6,
    "MFU %": None if peak is None else 100 * work * tokens_per_second / peak,
  }
