"""What `generalized_delta_rule` refuses."""

import numpy as np
import pytest

from pallas_kernels import generalized_delta_rule as rule
from tests.pallas_kernels.generalized_delta_rule.test_xla import inputs


def test_chunks_that_are_too_long_are_refused():
  arrays = inputs(np.float32, resets=False)
  with pytest.raises(ValueError, match="chunk_length=129 is not in 1 .. 128"):
    rule.generalized_delta_rule(
      arrays.pop("keys"), arrays.pop("values"), **arrays, chunk_length=129
    )


def test_chunks_that_are_too_long_for_a_decay_are_refused():
  arrays = inputs(np.float32, resets=False)
  message = "chunk_length=16 is not in 1 .. 15 for fastest_decay=5"
  with pytest.raises(ValueError, match=message):
    rule.generalized_delta_rule(
      arrays.pop("keys"), arrays.pop("values"), **arrays, fastest_decay=5.0
    )


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("keys", lambda k: k[0], r"keys.shape=\(2, 37, 5\)"),
    ("values", lambda v: v[:, :, 1:], r"values.shape=\(2, 2, 36, 3\)"),
    ("queries", lambda q: q[..., 1:], r"queries.shape=\(2, 2, 37, 4\)"),
    ("log_decay", lambda w: w[..., :1], "log_decay.shape="),
    ("weight", lambda w: w.mT, r"weight.shape=\(2, 2, 5, 3\)"),
    ("reset", lambda r: r[..., None], "reset.shape="),
    ("implementation", lambda _: "pallas", "implementation='pallas' is not"),
  ],
)
def test_generalized_delta_rule_rejects(name, change, message):
  arrays = inputs(np.float32)
  arrays[name] = change(arrays.get(name))
  with pytest.raises(ValueError, match=message):
    rule.generalized_delta_rule(
      arrays.pop("keys"), arrays.pop("values"), **arrays
    )
