"""What CI leaves to `scripts/test.sh --slow`: repeats on further models."""

import pytest


def slow_case(*values):
  """A case of `parametrize` that runs with --slow only."""
  return pytest.param(*values, marks=pytest.mark.slow)
