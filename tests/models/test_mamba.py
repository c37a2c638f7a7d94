"""Mamba and Samba against their recurrence."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.memory.selective_scan import selective_scan
from hope_jax.models.mamba import Mamba
from tests.models.test_attention import plain as attention
from tests.models.test_equations import feed_forward, perturbed, rms
from tests.models.test_models import init, make
from tests.pallas_kernels.testing import fast_jit

B, T, E, K = 2, 23, 6, 4


def token_loop(x, step, k, q, *, rate, state, reset):
  """o [T, E] and the last state [E, K] of one sequence (2312.00752, eq. 2)."""
  outputs = []
  for t in range(len(x)):
    state = np.zeros_like(state) if reset[t] else state
    decay = np.exp(-step[t][:, None] * rate)
    state = decay * state + np.outer(step[t] * x[t], k[t])
    outputs.append(state @ q[t])
  return np.array(outputs), state


def random_inputs(seed=0):
  rng = np.random.default_rng(seed)
  tokens = [rng.normal(size=(B, T, n)) for n in (E, E, K, K)]
  tokens[1] = np.exp(tokens[1])  # steps
  rate = np.exp(rng.normal(size=(E, K)))
  reset = rng.uniform(size=(B, T)) < 0.2
  return tokens, rate, rng.normal(size=(B, E, K)), reset


@pytest.mark.parametrize("chunk_length", [1, 5, 8, T, 64])
def test_scan_equals_the_token_loop(chunk_length):
  (x, step, k, q), rate, state, reset = random_inputs()
  with jax.enable_x64(True):
    found = fast_jit(
      functools.partial(
        selective_scan, chunk_length=chunk_length, checkpoint="chunk"
      )
    )(x, step, keys=k, queries=q, rate=rate, state=state, reset=reset)
  for row in range(B):
    one = [array[row] for array in (x, step, k, q)]
    outputs, last = token_loop(
      *one, rate=rate, state=state[row], reset=reset[row]
    )
    np.testing.assert_allclose(found.outputs[row], outputs, atol=1e-12)
    np.testing.assert_allclose(found.state[row], last, atol=1e-12)


def test_gradient_of_the_scan_does_not_depend_on_chunks():
  (x, step, k, q), rate, state, reset = random_inputs()

  def loss(inputs, chunk_length, checkpoint):
    x, step, k, q, rate, state = inputs
    found = selective_scan(
      x,
      step,
      keys=k,
      queries=q,
      rate=rate,
      state=state,
      reset=reset,
      chunk_length=chunk_length,
      checkpoint=checkpoint,
    )
    return jnp.sum(jnp.sin(found.outputs)) + jnp.sum(jnp.cos(found.state))

  inputs = (x, step, k, q, rate, state)
  with jax.enable_x64(True):
    wanted, found = (
      fast_jit(jax.grad(functools.partial(loss, **options)))(inputs)
      for options in (
        {"chunk_length": 1, "checkpoint": "none"},
        {"chunk_length": 7, "checkpoint": "chunk"},
      )
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), found, wanted
  )


def test_scan_holds_the_states_of_one_chunk_only():
  shape = jax.ShapeDtypeStruct
  length, chunk_length = 512, 16
  wide, narrow = shape((1, length, E), float), shape((1, length, K), float)

  def loss(x, step, k, q):
    rate, state = jnp.ones((E, K)), jnp.zeros((1, E, K))
    found = selective_scan(
      x,
      step,
      keys=k,
      queries=q,
      rate=rate,
      state=state,
      chunk_length=chunk_length,
    )
    return jnp.sum(found.outputs)

  traced = jax.make_jaxpr(jax.grad(loss))(wide, wide, narrow, narrow)
  largest = max(v.aval.size for e in traced.eqns for v in e.outvars)
  assert largest == length * E  # the states would be K times as much


def mamba_layer(p, n):
  """y [T, D] of one sequence, token by token (spec 03)."""
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
