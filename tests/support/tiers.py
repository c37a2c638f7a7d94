"""Selections of the tests: what CI runs where."""

import pytest

# `scripts/test.sh --core`: a file of each room, at most four minutes on two
# cores, for other versions of Python and JAX.
CORE = (
  "data/test_pipeline.py",
  "experiments/lib/test_trials.py",
  "memory/test_cms.py",
  "models/test_initial_values.py",
  "optim/test_registry.py",
  "pallas_kernels/linear_rule/test_pallas_common.py",
  "test_commands.py",
  "test_configs.py",
  "training/test_step.py",
)


def slow_case(*values):
  """A case of `parametrize` that CI leaves to `scripts/test.sh --slow`."""
  return pytest.param(*values, marks=pytest.mark.slow)
