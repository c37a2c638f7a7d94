"""What `selective_scan` refuses."""

import pytest

from pallas_kernels.selective_scan import selective_scan
from tests.pallas_kernels.selective_scan.test_xla import random_inputs


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("values", lambda x: x[0], r"values.shape=\(23, 6\)"),
    ("step_size", lambda s: s[..., :1], r"step_size.shape=\(2, 23, 1\)"),
    ("keys", lambda k: k[:, 1:], r"keys.shape=\(2, 22, 4\)"),
    ("queries", lambda q: q[..., :3], r"queries.shape=\(2, 23, 3\)"),
    ("decay_rate", lambda a: a.T, r"decay_rate.shape=\(4, 6\)"),
    ("state", lambda h: h[0], r"state.shape=\(6, 4\)"),
    ("reset", lambda r: r[..., None], "reset.shape="),
    ("implementation", lambda _: "pallas", "implementation='pallas' is not"),
    ("chunk_length", lambda _: 0, "chunk_length=0"),
  ],
)
def test_selective_scan_rejects(name, change, message):
  (x, step, k, q), rate, state, reset = random_inputs()
  arrays = dict(
    values=x,
    step_size=step,
    keys=k,
    queries=q,
    decay_rate=rate,
    state=state,
    reset=reset,
  )
  arrays[name] = change(arrays.get(name))
  with pytest.raises(ValueError, match=message):
    selective_scan(arrays.pop("values"), arrays.pop("step_size"), **arrays)
