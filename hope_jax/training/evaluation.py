"""Loss and accuracy on a split, and what the memories do on it."""

import math
from typing import Any

import jax
import numpy as np
from flax.typing import ArrayPytree as Tree
from jax.sharding import Mesh

from hope_jax.analysis import dynamics
from hope_jax.config import Config, Json
from hope_jax.data import pipeline, tokenizer
from hope_jax.runs import progress
from hope_jax.training import sharding, step

FIRST_POSITIONS = 64  # the first of `by_position`'s bins


def evaluate(
  eval_step: Any,
  params: Tree,
  source: Any,
  *,
  config: Config,
  mesh: Mesh,
  with_positions: bool = False,
) -> Json:
  """Mean over all weighted targets of a split (`config.eval.batches`).

  Returns loss (nats per target), accuracy and the number of targets, and
  `by_position` if asked for; sums over positions and batches are in float64.
  """
  size = config.eval.batch_size
  rows = sharding.process_rows(mesh, size)
  sums = []
  compiling = progress.Waiting("compiling the evaluation", patience=2.0)
  try:
    for batch in pipeline.eval_batches(source, size, rows, config.eval.batches):
      placed = sharding.put_batch(batch, mesh, size, rows)
      sums.append(eval_step(params, placed))
      compiling.end()  # the first batch's step is the one that compiles
  finally:
    compiling.end()
  total = np.asarray(sums, np.float64).sum(axis=0)  # [3, T]
  scores: Json = _means(total)
  if with_positions:
    scores["by_position"] = by_position(total)
  return scores


def _means(sums: np.ndarray) -> Json:
  """`Sums` [3, T] -> loss, accuracy and number of all targets."""
  total = step.Sums(*sums.sum(axis=1))
  return {
    "loss": float(total.loss / total.weight),
    "accuracy": float(total.correct / total.weight),
    "targets": int(total.weight),
  }


def by_position(sums: np.ndarray) -> list[Json]:
  """The means of positions 0 to 63, 64 to 127, 128 to 255 ...; `end` is the
  first position after them.  Positions without a target are left out."""
  count, ends = sums.shape[1], [FIRST_POSITIONS]
  while ends[-1] < count:
    ends.append(2 * ends[-1])
  ends[-1] = min(ends[-1], count)
  bins = zip([0, *ends], ends, strict=False)
  return [
    {"end": end, **_means(sums[:, begin:end])}
    for begin, end in bins
    if sums[2, begin:end].any()
  ]


def inner_dynamics(
  params: Tree, source: Any, *, config: Config, mesh: Mesh
) -> Json:
  """The dynamics of the split's first batch, by layer and level.

  Returns `dynamics` (`analysis.dynamics.flatten`) and `relative_change`: for
  each level, the median over layers of |D| / |M_0| at the sequence's end.
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


def perplexity(loss: float) -> float:
  """exp(loss), with losses above 700 nats cut so that it does not overflow."""
  return math.exp(min(loss, 700.0))


def derived(loss: float, config: Config) -> dict[str, float]:
  """perplexity, and bits_per_byte where tokens are bytes."""
  values = {"perplexity": perplexity(loss)}
  if isinstance(pipeline.load_tokenizer(config), tokenizer.Bytes):
    values["bits_per_byte"] = loss / math.log(2.0)
  return values
