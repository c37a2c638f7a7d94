"""`selective_scan` by chunks, and token by token, = a loop in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selective_scan import selective_scan
from tests.support.jit import fast_jit

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


@pytest.mark.parametrize(
  ("implementation", "chunk_length"),
  [("reference", 1), *(("xla", length) for length in (1, 5, 8, T, 64))],
)
def test_scan_equals_the_token_loop(implementation, chunk_length):
  (x, step, k, q), rate, state, reset = random_inputs()
  options = dict(implementation=implementation, chunk_length=chunk_length)
  with jax.enable_x64(True):
    found = fast_jit(
      functools.partial(selective_scan, **options, checkpoint="chunk")
    )(x, step, keys=k, queries=q, decay_rate=rate, state=state, reset=reset)
  for row in range(B):
    one = [array[row] for array in (x, step, k, q)]
    outputs, last = token_loop(
      *one, rate=rate, state=state[row], reset=reset[row]
    )
    np.testing.assert_allclose(found.outputs[row], outputs, atol=1e-12)
    np.testing.assert_allclose(found.state[row], last, atol=1e-12)


def test_gradient_of_the_scan_equals_the_references():
  (x, step, k, q), rate, state, reset = random_inputs()

  def loss(inputs, **options):
    x, step, k, q, rate, state = inputs
    found = selective_scan(
      x,
      step,
      keys=k,
      queries=q,
      decay_rate=rate,
      state=state,
      reset=reset,
      **options,
    )
    return jnp.sum(jnp.sin(found.outputs)) + jnp.sum(jnp.cos(found.state))

  inputs = (x, step, k, q, rate, state)
  with jax.enable_x64(True):
    wanted, found = (
      fast_jit(jax.grad(functools.partial(loss, **options)))(inputs)
      for options in (
        {"implementation": "reference"},
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
      decay_rate=rate,
      state=state,
      chunk_length=chunk_length,
    )
    return jnp.sum(found.outputs)

  traced = jax.make_jaxpr(jax.grad(loss))(wide, wide, narrow, narrow)
  largest = max(v.aval.size for e in traced.eqns for v in e.outvars)
  assert largest == length * E  # the states would be K times as much
