"""The processes that the runner starts import the repository's modules."""

import pytest

from experiments.lib.trials import ROOT


@pytest.fixture(autouse=True)
def import_from_root(monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
