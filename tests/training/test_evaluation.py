"""Scores by position."""

import numpy as np

from hope_jax.training import evaluation


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
