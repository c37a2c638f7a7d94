"""Settings of the whole suite: strict shapes, CPU, reproducible properties."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

# x[B, T] + y[T] is an error everywhere: write y[None].
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="module")
def fast_compilation():
  """Several times less compilation, for slower programs."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption(
    "--slow", action="store_true", help="also run tests that take minutes"
  )


def pytest_collection_modifyitems(
  config: pytest.Config, items: list[pytest.Item]
) -> None:
  if config.getoption("--slow"):
    return
  skip = pytest.mark.skip(reason="takes minutes: run with --slow")
  for item in items:
    if "slow" in item.keywords:
      item.add_marker(skip)
