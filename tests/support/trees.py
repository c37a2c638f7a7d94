"""Comparison of trees of arrays."""

import jax
import numpy as np


def assert_close(got, want, tolerance):
  """Compares trees; the error is relative to the largest entry of each leaf."""
  assert jax.tree.structure(got) == jax.tree.structure(want)

  def check(path, a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    error = np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-3)
    assert error <= tolerance, (jax.tree_util.keystr(path), error)

  jax.tree_util.tree_map_with_path(check, got, want)
