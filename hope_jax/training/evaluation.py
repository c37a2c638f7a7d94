"""Loss and accuracy of a split, and what the memories do in it."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hope_jax.config import Config
from hope_jax.data import pipeline, tokenizer
from hope_jax.training import dynamics, sharding, step


def evaluate(
  eval_step: Any, params: Any, source: Any, *, config: Config, mesh: Mesh
) -> dict[str, float]:
  """Mean over all weighted targets of a split (`config.eval.batches`).

  Returns loss (nats per target), accuracy and the number of targets; the
  sums of the batches are added in float64.
  """
  size = config.eval.batch_size
  rows = sharding.process_rows(mesh, size)
  sums = [
    eval_step(params, sharding.put_batch(batch, mesh, size, rows))
    for batch in pipeline.eval_batches(source, size, rows, config.eval.batches)
  ]
  total = step.Sums(*np.asarray(sums, np.float64).sum(axis=0))
  return {
    "loss": float(total.loss / total.weight),
    "accuracy": float(total.correct / total.weight),
    "targets": int(total.weight),
  }


def inner_dynamics(
  params: Any, source: Any, *, config: Config, mesh: Mesh
) -> dict[str, Any]:
  """The dynamics of the split's first batch, by layer and level.

  Returns `dynamics` (`training.dynamics.flatten`) and `relative_change`: per
  level the median over layers of |D| / |M_0| at the sequence's end.
  """
  size = config.eval.batch_size
  rows = sharding.process_rows(mesh, size)
  batch = next(pipeline.eval_batches(source, size, rows))
  collect = dynamics.build(config, mesh)
  sown = collect(params, sharding.put_batch(batch, mesh, size, rows))
  flat = dynamics.flatten(jax.device_get(sown))
  return {
    "dynamics": flat,
    "relative_change": dynamics.median_over_layers(flat, "relative_change"),
  }


def derived(loss: float, config: Config) -> dict[str, float]:
  """perplexity, and where tokens are bytes bits_per_byte."""
  values = {"perplexity": math.exp(min(loss, 700.0))}
  if isinstance(pipeline.load_tokenizer(config), tokenizer.Bytes):
    values["bits_per_byte"] = loss / math.log(2.0)
  return values
