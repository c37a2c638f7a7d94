"""What `linear_rule` refuses, and which implementation it takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_rule import api
from tests.support.kernels import call, random_inputs

KERNELS = "pallas_tpu", "pallas_gpu"


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
  "name, change, message",
  [
    ("x", lambda x: x[0], r"x.shape=\(2, 6, 5\)"),
    ("u", lambda u: u[:, :, 1:], r"u.shape=\(1, 2, 5, 3\)"),
    ("weight", lambda w: w.mT, r"weight.shape=\(1, 2, 5, 3\)"),
    ("weight", lambda w: None, "weight.shape=None"),
    ("momentum", lambda s: s[..., :-1], r"momentum.shape=\(1, 2, 3, 4\)"),
    ("momentum", lambda s: None, "both be given or None"),
    ("momentum_decay", lambda b: None, "both be given or None"),
    ("momentum_decay", lambda b: b[..., None], "momentum_decay.shape="),
    ("retention", lambda a: a[..., :1], r"retention.shape=\(1, 2, 1\)"),
    ("retention", lambda a: None, "retention.shape=None"),
    ("step_size", lambda n: n[0], "step_size.shape="),
    ("erase", lambda d: d[..., None], "erase.shape="),
    ("queries", lambda q: q[..., :3], "queries.shape="),
    ("reset", lambda r: jnp.zeros((1, 2, 7), bool), "reset.shape="),
    ("reset", lambda r: jnp.zeros((1, 2, 6)), "must be bool"),
    ("read", lambda _: "after", "read='after' is not one of 'pre', 'post'"),
    ("implementation", lambda _: "pallas", "implementation='pallas'"),
    ("checkpoint", lambda _: "all", "checkpoint='all'"),
    ("chunk_length", lambda _: 0, "chunk_length=0"),
  ],
)
def test_linear_rule_rejects(name, change, message):
  inputs = random_inputs((1, 2, 6, 5, 3)) | dict(chunk_length=4)
  inputs[name] = change(inputs.get(name))
  with pytest.raises(ValueError, match=message):
    call(inputs)


@pytest.mark.usefixtures("float64")
def test_default_implementation_is_logged_once(monkeypatch):
  messages = []
  monkeypatch.setattr(api.logging, "info", messages.append)
  api._log_choice.cache_clear()
  for _ in range(2):
    jax.eval_shape(
      functools.partial(call, chunk_length=4), random_inputs((1, 2, 6, 5, 3))
    )
  assert len(messages) == 1 and '"xla"' in messages[0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_explicit_kernels_raise_where_they_cannot_run(kernel):
  inputs = random_inputs((1, 1, 32, 16, 16), dtype=np.float32)
  with pytest.raises(Exception, match="(?i)interpret mode"):
    call(inputs, chunk_length=16, implementation=kernel)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_refuse_float64(kernel):
  with pytest.raises(NotImplementedError, match='float64: use "xla"'):
    call(
      random_inputs((1, 1, 32, 16, 16)), chunk_length=16, implementation=kernel
    )
