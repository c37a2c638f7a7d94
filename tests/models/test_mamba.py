"""Mamba and Samba against their recurrence."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models.mamba import Mamba
from tests.models.test_attention import plain as attention
from tests.models.test_equations import feed_forward, perturbed, rms
from tests.pallas_kernels.selective_scan.test_xla import token_loop
from tests.support.jit import fast_jit
from tests.support.models import init, make


def mamba_layer(p, n):
  """y [T, D] of one sequence, token by token."""
  v = n @ p["value"]["kernel"]
  kernel = p["conv_value"]["kernel"]
  padded = np.pad(v, ((len(kernel) - 1, 0), (0, 0)))
  taps = [padded[len(kernel) - 1 - j :][: len(v)] for j in range(len(kernel))]
  v = sum(tap * row for tap, row in zip(taps, kernel, strict=True))
  v = jax.nn.silu(v + p["conv_value"]["bias"])
  gates, readout = p["gates"], p["readout"]
  step = v @ gates["step_low"]["kernel"] @ gates["step"]["kernel"]
  step = np.log1p(np.exp(step + gates["step_bias"]))
  rate = np.exp(gates["log_decay_rate"])
  outputs, _ = token_loop(
    *(np.asarray(x) for x in (v, step)),
    *(np.asarray(v @ p[name]["kernel"]) for name in ("key", "query")),
    rate=rate,
    state=np.zeros(rate.shape),
    reset=np.zeros(len(n), bool),
  )
  y = outputs + readout["norm_skip"] * v
  y = y * jax.nn.silu(n @ readout["gate"]["kernel"])
  return y @ readout["output"]["kernel"]


def plain_model(params, tokens, config):
  """Logits [T, V] of one sequence; Samba's blocks take turns."""
  x = params["embed"]["embedding"][tokens]
  blocks, numbers = params["blocks"], np.zeros(len(tokens))
  for number in range(config.num_layers):
    p = blocks
    if config.sequence_layer == "samba":
      p, number = blocks[f"block_{number % 2}"], number // 2
    p = jax.tree.map(lambda x, i=number: x[i], p)
    n = rms(x, p["norm_mixer"]["scale"])
    if "query" in p["mixer"] and "gates" not in p["mixer"]:
      mixer = {"params": p["mixer"]}
      x = x + attention(mixer, n, config, config.attention_window, numbers)
    else:
      x = x + mamba_layer(p["mixer"], n)
    if config.ffn_hidden:
      x = x + feed_forward(p["ffn"], rms(x, p["norm_ffn"]["scale"]))
  return rms(x, params["norm_out"]["scale"]) @ params["embed"]["embedding"].T


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("mamba", {"ffn_hidden": 0, "width": 18}),
    ("samba", {"num_layers": 4, "attention_window": 7}),
  ],
)
def test_model_equals_its_equations(name, fields):
  config = make(name, **fields)
  with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
    model, params, tokens = init(config)
    params = perturbed(jax.tree.map(lambda x: np.asarray(x, float), params))
    logits = fast_jit(model.apply)({"params": params}, tokens).logits
    expected = plain_model(params, tokens[1], config)
  np.testing.assert_allclose(logits[1], expected, atol=3e-5)


def test_mamba_starts_as_published():
  """Decays 1 .. 16 in every channel, steps in 0.001 .. 0.1, D = 1."""
  x = jnp.zeros((1, 1, 64))
  boxed = fast_jit(Mamba(make("mamba", width=64)).init)(jax.random.key(0), x)
  params = jax.tree.map(np.asarray, nn.unbox(boxed["params"]))
  gates = params["gates"]
  rates = np.exp(gates["log_decay_rate"])
  np.testing.assert_allclose(
    rates, np.tile(np.arange(1, 17), (128, 1)), rtol=1e-5
  )
  steps = np.log1p(np.exp(gates["step_bias"]))
  assert 0.001 <= steps.min() < 0.002 and 0.05 < steps.max() <= 0.1
  assert abs(np.log(steps).mean() - np.log(0.01)) < 0.3
  weight = gates["step"]["kernel"]
  assert weight.shape == (4, 128) and 0.49 < np.abs(weight).max() <= 0.5
  assert (params["readout"]["norm_skip"] == 1).all()
