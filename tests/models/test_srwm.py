"""The self-referential matrix against its equations, token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models import language_model, srwm
from tests.models.test_equations import perturbed
from tests.models.test_lstm import feed_forward, rms
from tests.support.jit import fast_jit
from tests.support.models import B, T, init, make


def softmax(x):
  powers = np.exp(x - x.max())
  return powers / powers.sum()


def head(start, xs, documents, is_live):
  """One head's y [T, K] of its inputs [T, K] (2202.05780)."""
  size = xs.shape[1]
  matrix, outputs = start, []
  for t, x in enumerate(xs):
    if t and documents[t] != documents[t - 1]:
      matrix = start
    y, k, q, b = np.split(matrix @ softmax(x), [size, 2 * size, 3 * size])
    outputs.append(y)
    k, q = softmax(k), softmax(q)
    step = np.repeat(1 / (1 + np.exp(-b)), [size, size, size, 4])
    difference = matrix @ q - matrix @ k
    if is_live:
      matrix = matrix + np.outer(step * difference, k)
  return np.stack(outputs)


def plain_model(params, tokens, documents, is_live):
  """Logits [T, V] of one sequence."""
  table = params["embed"]["embedding"]
  x = table[tokens]
  for number in range(params["blocks"]["norm_ffn"]["scale"].shape[0]):
    p = jax.tree.map(lambda w, number=number: w[number], params["blocks"])
    n = rms(x, p["norm_mixer"]["scale"])
    starts = p["mixer"]["initial"]["memory_output"]
    parts = np.split(n, len(starts), axis=1)
    heads = [
      head(start, part, documents, is_live)
      for start, part in zip(starts, parts, strict=True)
    ]
    x = x + np.hstack(heads) @ p["mixer"]["output"]["kernel"]
    x = x + feed_forward(p["ffn"], rms(x, p["norm_ffn"]["scale"]))
  return rms(x, params["norm_out"]["scale"]) @ table.T


@pytest.mark.parametrize(
  "fields",
  [{}, {"inner_rates": "off"}, {"frozen_levels": ("memory",)}],
  ids=str,
)
def test_srwm_equals_its_equations(fields):
  model, params, tokens = init(make("srwm", **fields))
  params = perturbed(params)
  documents = np.repeat([0, 1, 2], [9, 1, T - 10])
  batch = jnp.asarray(documents)[None].repeat(B, 0)
  logits = fast_jit(model.apply)({"params": params}, tokens, None, batch).logits
  exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  for row in range(B):
    expected = plain_model(
      exact, np.asarray(tokens[row]), documents, is_live=not fields
    )
    np.testing.assert_allclose(logits[row], expected, atol=1e-5)


def test_writes_matter_and_every_part_gets_a_gradient():
  model, params, tokens = init(make("srwm"))
  run = lambda model, p: model.apply({"params": p}, tokens).logits
  off = dataclasses.replace(model.config, inner_rates="off")
  twin = language_model.LanguageModel(off)
  live = fast_jit(lambda p: run(model, p))(params)
  assert jnp.abs(live - fast_jit(lambda p: run(twin, p))(params)).max() > 1e-3
  gradient = fast_jit(jax.grad(lambda p: jnp.sum(run(model, p) ** 2)))(params)
  rows = gradient["blocks"]["mixer"]["initial"]["memory_output"]
  for part in jnp.split(rows, [8, 16, 24], axis=2):  # y, k, q, rates
    assert (jnp.linalg.norm(part, axis=(2, 3)) > 0).all()


def test_dynamics_and_state_say_how_far_the_matrix_moved():
  config = make("srwm", num_layers=1)
  network = srwm.SelfReferentialMatrix(config)
  x = jax.random.normal(jax.random.key(0), (B, 12, config.width))
  variables = network.init(jax.random.key(1), x)
  params = {"params": variables["params"]}
  out, sown = network.apply(
    params, x, srwm.init_state(config, B), mutable=["dynamics"]
  )
  (found,) = jax.tree.leaves(sown)
  difference = out.state.memory.weight.output
  (start,) = jax.tree.leaves(params["params"]["initial"])
  norm = lambda w: jnp.linalg.norm(w, axis=(-2, -1))
  ratio = norm(difference) / norm(start)[None]
  np.testing.assert_allclose(found, jnp.median(ratio), rtol=1e-6)
  assert found > 1e-3
