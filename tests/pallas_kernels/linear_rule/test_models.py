"""The linear models of docs/equations.md as choices of `linear_rule`.

Each against a token loop in numpy that follows the model's own paper.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_rule import linear_rule
from tests.support.jit import fast_jit

pytestmark = pytest.mark.usefixtures("float64")

_B, _H, _T, _K, _E = 2, 2, 22, 6, 4


def _model_inputs():
  rng = np.random.default_rng(2)
  q, k = rng.normal(size=(2, _B, _H, _T, _K))
  v = rng.normal(size=(_B, _H, _T, _E))
  return q * _K**-0.5, k / np.linalg.norm(k, axis=-1, keepdims=True), v


def _gates(seed, low=0.0, high=1.0):
  rng = np.random.default_rng(seed)
  return rng.uniform(low, high, size=(_B, _H, _T))


def _loop(step, width=_E):
  """Runs S, y = step(S, index of the head, token) over all tokens."""
  outputs = np.zeros((_B, _H, _T, width))
  for b, h in np.ndindex(_B, _H):
    state = np.zeros((width, _K))
    for t in range(_T):
      state, outputs[b, h, t] = step(state, (b, h, t))
  return outputs


def _run_model(key, u, query, *, retention, step_size, erase=None):
  arrays = [
    None if v is None else jnp.asarray(v)
    for v in (key, u, query, retention, step_size, erase)
  ]
  key, u, query, retention, step_size, erase = arrays

  def run(*arrays):
    key, u, query, retention, step_size, erase = arrays
    return linear_rule(
      key,
      u,
      weight=jnp.zeros((_B, _H, u.shape[-1], _K)),
      momentum=None,
      retention=retention,
      momentum_decay=None,
      step_size=step_size,
      erase=erase,
      queries=query,
      read="post",
      chunk_length=8,
    ).outputs

  return fast_jit(run)(key, u, query, retention, step_size, erase)


def test_linear_attention():
  q, k, v = _model_inputs()
  ones = np.ones((_B, _H, _T))
  got = _run_model(k, -v, q, retention=ones, step_size=ones)
  scores = np.tril(np.einsum("BHTK,BHSK->BHTS", q, k))
  want = np.einsum("BHTS,BHSE->BHTE", scores, v)
  np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_retnet():
  q, k, v = _model_inputs()
  gamma_H = 1 - 2.0 ** (-5 - np.arange(_H))
  ones = np.ones((_B, _H, _T))
  got = _run_model(
    k, -v, q, retention=ones * gamma_H[None, :, None], step_size=ones
  )

  def step(state, i):
    state = gamma_H[i[1]] * state + np.outer(v[i], k[i])
    return state, state @ q[i]

  np.testing.assert_allclose(got, _loop(step), rtol=1e-10, atol=1e-12)


def test_mamba2():
  c, b, x = _model_inputs()
  dt, a_log, skip = _gates(3), np.array([0.3, 1.5]), np.array([0.7, -0.2])
  retention = np.exp(-dt * np.exp(a_log)[None, :, None])
  got = _run_model(b, -x, c, retention=retention, step_size=dt)
  got += skip[None, :, None, None] * x

  def step(state, i):
    decay = np.exp(-dt[i] * np.exp(a_log[i[1]]))
    state = decay * state + dt[i] * np.outer(x[i], b[i])
    return state, state @ c[i] + skip[i[1]] * x[i]

  np.testing.assert_allclose(got, _loop(step), rtol=1e-10, atol=1e-12)


def test_deltanet():
  q, k, v = _model_inputs()
  b = _gates(3)
  got = _run_model(k, -v, q, retention=np.ones_like(b), step_size=b, erase=b)

  def step(state, i):  # move the value at k towards v by a fraction b
    state = state + b[i] * np.outer(v[i] - state @ k[i], k[i])
    return state, state @ q[i]

  np.testing.assert_allclose(got, _loop(step), rtol=1e-10, atol=1e-12)


def test_gated_deltanet():
  q, k, v = _model_inputs()
  b, alpha = _gates(3), _gates(4, 0.8)
  got = _run_model(k, -v, q, retention=alpha, step_size=b, erase=alpha * b)

  def step(state, i):  # decay, then the delta rule on the decayed state
    state = alpha[i] * state
    state = state + b[i] * np.outer(v[i] - state @ k[i], k[i])
    return state, state @ q[i]

  np.testing.assert_allclose(got, _loop(step), rtol=1e-10, atol=1e-12)


def test_comba():
  q, k, v = _model_inputs()
  b, alpha = _gates(3), _gates(4, 0.8)
  c, d = np.array([0.3, 0.9]), 0.02
  corrected = q - d * c[None, :, None, None] * k
  corrected /= np.linalg.norm(corrected, axis=-1, keepdims=True)
  got = _run_model(
    k,
    -v,
    corrected,
    retention=alpha,
    step_size=b,
    erase=c[None, :, None] * b,
  )

  def step(state, i):
    feedback = c[i[1]] * b[i] * np.outer(k[i], k[i])
    state = state @ (alpha[i] * np.eye(_K) - feedback)
    state = state + b[i] * np.outer(v[i], k[i])
    query = q[i] - d * c[i[1]] * k[i]
    return state, state @ (query / np.linalg.norm(query))

  np.testing.assert_allclose(got, _loop(step), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_length", [1, 11])
def test_linear_titans(chunk_length):
  """Loss ||W k - v||^2 at the first state of each chunk, with momentum."""
  q, k, v = map(jnp.asarray, _model_inputs())
  decay, rate = _gates(3, 0.5), _gates(4, 0.0, 0.2)
  forget = _gates(5, 0.0, 0.1)
  shape = (_B, _H, _E, _K)
  weight0, momentum0 = np.random.default_rng(6).normal(size=(2, *shape))

  @fast_jit
  def run_chunk(state, chunk):
    weight, momentum = state
    q, k, v, decay, rate, forget = chunk
    out = linear_rule(
      k,
      2 * (jnp.einsum("BHCK,BHEK->BHCE", k, weight) - v),
      weight=weight,
      momentum=momentum,
      retention=1 - forget,
      momentum_decay=decay,
      step_size=rate,
      erase=None,
      queries=q,
      read="post",
      chunk_length=chunk_length,
    )
    return (out.weight, out.momentum), out.outputs

  state, got = (jnp.asarray(weight0), jnp.asarray(momentum0)), []
  for start in range(0, _T, chunk_length):
    chunk = [
      jnp.asarray(array[:, :, start : start + chunk_length])
      for array in (q, k, v, decay, rate, forget)
    ]
    state, outputs = run_chunk(state, chunk)
    got.append(outputs)

  want = np.zeros((_B, _H, _T, _E))
  q, k, v = map(np.asarray, (q, k, v))
  for b, h in np.ndindex(_B, _H):
    weight, momentum = weight0[b, h], momentum0[b, h]
    for t in range(_T):
      if t % chunk_length == 0:
        first = weight
      i = b, h, t
      surprise = 2 * np.outer(first @ k[i] - v[i], k[i])
      momentum = decay[i] * momentum - rate[i] * surprise
      weight = (1 - forget[i]) * weight + momentum
      want[i] = weight @ q[i]
    np.testing.assert_allclose(state[0][b, h], weight, rtol=1e-10, atol=1e-12)
  np.testing.assert_allclose(
    np.concatenate(got, axis=2), want, rtol=1e-10, atol=1e-12
  )


def test_ttt_inner_difference():
  """TTT-Linear without its LN: W_t = W_c + c_t D_t, c_t of the reader."""
  q, k, v = _model_inputs()
  rate, scale = _gates(3, 0.0, 0.3), _gates(4, 0.1)
  mini_batch = 11
  weight0 = np.random.default_rng(6).normal(size=(_B, _H, _E, _K))

  @fast_jit
  def run_mini_batch(weight, chunk):
    q, k, v, rate, scale = chunk
    out = linear_rule(
      k,
      jnp.einsum("BHCK,BHEK->BHCE", k, weight) - v,
      weight=jnp.zeros_like(weight),
      momentum=None,
      retention=jnp.ones_like(rate),
      momentum_decay=None,
      step_size=rate,
      erase=None,
      queries=q,
      read="post",
      chunk_length=mini_batch,
    )
    read = jnp.einsum("BHCK,BHEK->BHCE", q, weight)
    read += scale[..., None] * out.outputs
    return weight + scale[..., -1, None, None] * out.weight, read

  weight, got = jnp.asarray(weight0), []
  for start in range(0, _T, mini_batch):
    chunk = [
      jnp.asarray(array[:, :, start : start + mini_batch])
      for array in (q, k, v, rate, scale)
    ]
    weight, outputs = run_mini_batch(weight, chunk)
    got.append(outputs)

  want = np.zeros((_B, _H, _T, _E))
  for b, h in np.ndindex(_B, _H):
    current = weight0[b, h]
    for t in range(_T):
      i = b, h, t
      if t % mini_batch == 0:
        first, gradients = current, np.zeros((_E, _K))
      gradients += rate[i] * np.outer(first @ k[i] - v[i], k[i])
      current = first - scale[i] * gradients
      want[i] = current @ q[i]
    np.testing.assert_allclose(weight[b, h], current, rtol=1e-10, atol=1e-12)
  np.testing.assert_allclose(
    np.concatenate(got, axis=2), want, rtol=1e-10, atol=1e-12
  )
