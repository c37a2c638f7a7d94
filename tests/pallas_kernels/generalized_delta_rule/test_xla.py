"""`generalized_delta_rule` by chunks = token by token; fast decays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import generalized_delta_rule as rule
from tests.support.jit import fast_jit
from tests.support.trees import assert_close

B, H, T, K, E = 2, 2, 37, 5, 3
FASTEST = -np.exp(-0.5)  # of RWKV-7's log decays


def inputs(dtype=np.float64, *, resets=True, length=T, decays=None):
  """As in RWKV-7: p = -kappa of norm 1, b = a kappa; keys are its keywords."""
  rng = np.random.default_rng(0)
  shape = B, H, length, K
  kappa = rng.normal(size=shape)
  kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
  if decays is None:
    decays = rng.uniform(FASTEST, 0, size=shape)
  arrays = dict(
    keys=rng.normal(size=shape),
    values=rng.normal(size=(*shape[:3], E)),
    queries=rng.normal(size=shape),
    log_decay=np.broadcast_to(decays, shape),
    erase_read=-kappa,
    erase_write=kappa * rng.uniform(size=shape),
    weight=rng.normal(size=(B, H, E, K)),
  )
  arrays = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
  if resets:  # also in the first token, and two in a row
    reset = rng.uniform(size=shape[:3]) < 0.1
    reset[0, 0, [0, 20, 21]] = True
    arrays["reset"] = jnp.asarray(reset)
  return arrays


def values_and_vjp(run, arrays):
  arrays = dict(arrays)
  reset = arrays.pop("reset", None)

  def outputs(arrays):
    return run(arrays.pop("keys"), arrays.pop("values"), **arrays, reset=reset)

  def both(arrays):
    out, pull = jax.vjp(outputs, arrays)
    rng = np.random.default_rng(1)
    cotangent = jax.tree.map(
      lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), out
    )
    return out, pull(cotangent)

  return fast_jit(both)(arrays)


def reference(fastest=-FASTEST):
  return functools.partial(
    rule.generalized_delta_rule,
    fastest_decay=fastest,
    implementation="reference",
  )


@functools.cache
def expected(**options):
  return values_and_vjp(reference(), inputs(**options))


@pytest.mark.parametrize("chunk_length", [1, 4, 16, 32, 100])
@pytest.mark.parametrize("resets", [True, False])
def test_chunks_equal_reference_values_and_vjps(chunk_length, resets):
  with jax.enable_x64(True):
    run = functools.partial(
      rule.generalized_delta_rule, chunk_length=chunk_length
    )
    got = values_and_vjp(run, inputs(resets=resets))
    assert_close(got, expected(resets=resets), 1e-11)


@pytest.mark.parametrize("chunk_length", [16, 64, rule.MAX_CHUNK_LENGTH])
def test_fastest_and_slowest_decay_keep_float32(chunk_length):
  """Channels that lose the most and those that lose nothing, side by side."""
  decays = np.where(np.arange(K) % 2, FASTEST, -1e-6)
  arrays = dict(length=rule.MAX_CHUNK_LENGTH, decays=decays, resets=False)
  run = functools.partial(
    rule.generalized_delta_rule, chunk_length=chunk_length
  )
  got = values_and_vjp(run, inputs(np.float32, **arrays))
  with jax.enable_x64(True):
    want = values_and_vjp(reference(), inputs(**arrays))
  assert_close(got, want, 1e-5)


@pytest.mark.parametrize(
  ("fastest", "chunk_length"), [(4.8, 16), (17.0, 4), (77.0, 1)]
)
def test_faster_decays_take_shorter_chunks(fastest, chunk_length):
  """From 1 down to the declared bound, side by side and one after another."""
  rng = np.random.default_rng(3)
  decays = -fastest * rng.uniform(size=(B, H, T, K)) ** 3
  decays[:, :, ::5, 1:] = -fastest
  arrays = dict(decays=decays, resets=False)
  run = functools.partial(
    rule.generalized_delta_rule,
    chunk_length=chunk_length,
    fastest_decay=fastest,
  )
  got = values_and_vjp(run, inputs(np.float32, **arrays))
  with jax.enable_x64(True):
    want = values_and_vjp(reference(fastest), inputs(**arrays))
  assert_close(got, want, 2e-5)


def test_decays_outside_of_the_bounds_count_as_the_bounds():
  decays = np.where(np.arange(K) % 2, -50.0, 3.0)
  bounds = np.where(np.arange(K) % 2, FASTEST, 0.0)
  run = rule.generalized_delta_rule
  got, want = (
    values_and_vjp(run, inputs(np.float32, decays=x)) for x in (decays, bounds)
  )
  assert not np.any(got[1][0].pop("log_decay"))
  want[1][0].pop("log_decay")
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
