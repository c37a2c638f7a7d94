"""`checkpointed_scan` = `jax.lax.scan`, with fewer saved states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import scan
from tests.support.jit import fast_jit

STATE_SIZE = 250  # no number of steps below


pytestmark = pytest.mark.usefixtures("float64")


def _body(carry, x):
  """Has a nested carry, a None in xs, and a None in ys."""
  state, count = carry
  state = jnp.sin(state * x["scale"]) + x["shift"]
  return (state, count + 1), {"sum": jnp.sum(state), "state": state, "no": None}


def _inputs(num_steps):
  rng = np.random.default_rng(num_steps)
  xs = {
    "scale": jnp.asarray(rng.normal(size=num_steps)),
    "shift": jnp.asarray(rng.normal(size=(num_steps, 3))),
    "missing": None,
  }
  return (jnp.asarray(rng.normal(size=3)), jnp.asarray(0)), xs


def _run(scan_fn, num_steps):
  (state, count), xs = _inputs(num_steps)

  def loss(state, xs):
    (last, steps), ys = scan_fn(_body, (state, count), xs)
    value = jnp.sum(jnp.cos(last)) + jnp.sum(jnp.cos(ys["sum"]))
    return value + jnp.sum(ys["state"] ** 2), (last, steps, ys)

  run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  return fast_jit(run)(state, xs)


# With threshold 4: below, at and just above it; groups that fit; a remainder.
@pytest.mark.parametrize("policy", ["none", "chunk", "sqrt"])
@pytest.mark.parametrize("num_steps", [1, 4, 5, 9, 14])
def test_checkpointed_scan_equals_scan(policy, num_steps):
  got = _run(
    lambda *args: scan.checkpointed_scan(*args, policy=policy, threshold=4),
    num_steps,
  )
  want = _run(jax.lax.scan, num_steps)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13),
    got,
    want,
  )


def _saved_states(num_steps, policy):
  """How many states the vjp of a scan keeps."""

  def run(state):
    return scan.checkpointed_scan(
      lambda state, x: (jnp.sin(state) * x, None),
      state,
      jnp.ones(num_steps),
      policy=policy,
      threshold=16,
    )[0]

  _, vjp = jax.vjp(run, jnp.ones(STATE_SIZE))
  saved = [leaf for leaf in jax.tree.leaves(vjp) if STATE_SIZE in leaf.shape]
  return sum(leaf.size for leaf in saved) / STATE_SIZE


def _peak_states(num_steps, policy):
  """The compiled gradient's temporary memory, in states."""

  def loss(state, xs):
    state, _ = scan.checkpointed_scan(
      lambda state, x: (jnp.sin(state) * x, None),
      state,
      xs,
      policy=policy,
      threshold=16,
    )
    return jnp.sum(state)

  args = jnp.ones(STATE_SIZE), jnp.ones(num_steps)
  compiled = jax.jit(jax.grad(loss)).lower(*args).compile()
  return compiled.memory_analysis().temp_size_in_bytes / (8 * STATE_SIZE)


def test_checkpointed_scan_saves_root_n_states():
  for num_steps in (64, 256, 1024):
    root = num_steps**0.5
    saved = _saved_states(num_steps, "sqrt")
    assert root - 1 <= saved <= root + 2, (num_steps, saved)
    # One group's states on top, while it is differentiated.
    peak = _peak_states(num_steps, "sqrt")
    assert peak <= 2 * root + 5, (num_steps, peak)
  assert _saved_states(256, "chunk") >= 256
  assert _saved_states(256, "none") >= 256
  assert _peak_states(256, "chunk") >= 256


@pytest.mark.parametrize("axis", [0, 2, -1])
@pytest.mark.parametrize("chunk_length", [1, 4, 7, 10])
def test_split_chunks_cuts_pads_and_merges_back(chunk_length, axis):
  x = jnp.arange(2 * 3 * 7.0).reshape(2, 3, 7)
  x = jnp.moveaxis(x, 2, axis)
  chunks = scan.split_chunks(x, chunk_length, axis, pad_value=-1)
  assert chunks.shape[0] == -(-7 // chunk_length)
  # Token t is token t mod C of chunk t // C; what follows T is padding.
  by_token = jnp.moveaxis(chunks, 1 + axis % x.ndim, 1).reshape(-1, 2, 3)
  np.testing.assert_array_equal(by_token[:7], jnp.moveaxis(x, axis, 0))
  np.testing.assert_array_equal(by_token[7:], -1)
  merged = scan.merge_chunks(chunks, 7, axis)
  np.testing.assert_array_equal(merged, x)


def test_checkpointed_scan_rejects_bad_arguments():
  with pytest.raises(ValueError, match="policy='root'"):
    scan.checkpointed_scan(_body, *_inputs(3), policy="root")
  with pytest.raises(ValueError, match="at least one array"):
    scan.checkpointed_scan(lambda c, x: (c, x), jnp.ones(3), None)
