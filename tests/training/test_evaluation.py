"""Scores of a split, and by position."""

import dataclasses
import math

import jax
import numpy as np

from hope_jax.config import DataConfig, EvalConfig, MeshConfig
from hope_jax.training import evaluation, sharding
from hope_jax.training.step import Sums


def split(count):
  """Examples of two positions; the second has a target in every third."""
  return [
    {"loss": np.float32([n, 1.0]), "weights": np.float32([1.0, n % 3 == 0])}
    for n in range(count)
  ]


def score(config, examples, **options):
  """`evaluate` with the examples' own losses; a third of them is a hit."""

  def eval_step(params, batch):
    del params
    loss, weights = (np.asarray(batch[key]) for key in ("loss", "weights"))
    hits = weights * (loss % 3 == 0)
    sums = Sums(loss * weights, hits, weights)
    return Sums(*(each.sum(axis=0) for each in sums))

  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  return evaluation.evaluate(
    eval_step, None, examples, config=config, mesh=mesh, **options
  )


def test_evaluate_is_the_mean_over_all_targets(tiny):
  """Not over batches, the last of which is padded."""
  config = dataclasses.replace(tiny, eval=EvalConfig(batches=0, batch_size=4))
  found = score(config, split(9), with_positions=True)
  # Position 0: 0 + 1 + ... + 8; position 1: examples 0, 3 and 6.
  assert found == {
    "loss": (36 + 3) / 12,
    "accuracy": 3 / 12,
    "targets": 12,
    "by_position": [
      {"end": 2, "loss": 39 / 12, "accuracy": 3 / 12, "targets": 12}
    ],
  }
  some = dataclasses.replace(config, eval=EvalConfig(batches=2, batch_size=4))
  assert score(some, split(9))["targets"] == 11
  assert "by_position" not in score(some, split(9))


def test_evaluate_adds_small_losses_to_large_sums(tiny):
  """In float32 nothing would come of the last five."""
  config = dataclasses.replace(tiny, eval=EvalConfig(batches=0, batch_size=1))
  one = np.float32([1.0])
  examples = [{"loss": one * 2**25, "weights": one}]
  examples += [{"loss": one, "weights": one}] * 5
  assert score(config, examples)["loss"] == (2**25 + 5) / 6


def test_derived_scores(tiny):
  assert evaluation.derived(2.0, tiny) == {
    "perplexity": math.exp(2.0),
    "bits_per_byte": 2.0 / math.log(2.0),
  }
  recall = dataclasses.replace(
    tiny, data=DataConfig(kind="mqar", sequence_length=32)
  )
  assert evaluation.derived(0.0, recall) == {"perplexity": 1.0}
  assert math.isfinite(evaluation.perplexity(1e6))


def test_by_position_has_the_means_of_doubling_bins():
  loss = np.arange(200.0)
  weight = np.ones(200)
  weight[64:128] = 0  # no target there
  found = evaluation.by_position(np.stack([loss * weight, 0 * loss, weight]))
  assert [(bin["end"], bin["targets"]) for bin in found] == [
    (64, 64),
    (200, 72),
  ]
  assert [bin["loss"] for bin in found] == [31.5, 163.5]
  assert found[0]["accuracy"] == 0
