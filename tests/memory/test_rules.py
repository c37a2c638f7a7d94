"""The proximal step of DGD is the argmin that it claims to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from hope_jax.config import MemoryConfig
from hope_jax.memory import rules
from hope_jax.memory.rules import Gates


@pytest.mark.parametrize("eta", [0.1, 0.7, 5.0])
def test_proximal_step_is_the_argmin(eta):
  """argmin_W 1/2 |W x - u*|^2 + 1/(2 eta) |W - alpha W_t|^2, by BFGS."""
  rng = np.random.default_rng(0)
  weight, x = rng.normal(size=(3, 4)), rng.normal(size=4)
  target, alpha = rng.normal(size=3), 0.9

  def objective(flat):
    candidate = flat.reshape(weight.shape)
    residual = candidate @ x - target
    change = candidate - alpha * weight
    return 0.5 * residual @ residual + 0.5 / eta * np.sum(change**2)

  found = scipy.optimize.minimize(objective, weight.ravel(), tol=1e-12)
  with jax.enable_x64(True):
    gates = Gates(jnp.array([eta]), jnp.array([alpha]), None)
    cfg = MemoryConfig(momentum="none")
    step, erase = rules.layer_rates(
      jnp.array(x)[None], gates, cfg, chunk_length=1
    )
  assert erase is not None
  # (P) with u = -u*: W (alpha - erase x x^T) + step u* x^T.
  ours = (
    alpha * weight
    - float(erase[0]) * np.outer(weight @ x, x)
    + float(step[0]) * np.outer(target, x)
  )
  np.testing.assert_allclose(ours, found.x.reshape(weight.shape), atol=2e-6)


def test_clip_norm_bounds_the_norm_and_keeps_the_direction():
  error = jnp.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
  clipped = rules.clip_norm(error, 1.0)
  np.testing.assert_allclose(
    clipped, [[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]], rtol=1e-6
  )
  assert rules.clip_norm(error, 0.0) is error


def test_momentum_average_scales_the_step_and_not_the_erase():
  gates = Gates(jnp.array([0.5]), jnp.array([0.9]), jnp.array([0.8]))
  x = jnp.array([[1.0, 0.0]])
  averaged, plain = (
    rules.layer_rates(x, gates, MemoryConfig(momentum=momentum), chunk_length=1)
    for momentum in ("averaged", "sum")
  )
  np.testing.assert_allclose(averaged[0], 0.2 * plain[0], rtol=1e-5)
  np.testing.assert_allclose(averaged[1], plain[1])


@pytest.mark.parametrize("setting", ["chunk_l2", "negative_eigenvalues"])
def test_learn_rate_starts_where_it_is_set(setting):
  cfg = MemoryConfig(setting=setting)
  logit = rules.learn_rate_logit(0.7, cfg)
  np.testing.assert_allclose(rules.learn_rate(logit, cfg), 0.7, rtol=1e-5)
  top = rules.learn_rate(jnp.array(30.0), cfg)
  assert (top == 2) == (setting == "negative_eigenvalues")
