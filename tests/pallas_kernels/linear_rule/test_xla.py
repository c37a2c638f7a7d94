"""`linear_rule` by chunks = token by token; precision, causality."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_rule import LinearRuleOutput
from tests.support.jit import fast_jit
from tests.support.kernels import call, random_inputs
from tests.support.trees import assert_close

pytestmark = pytest.mark.usefixtures("float64")


@functools.cache
def _compiled_vjp(**options):
  def run(inputs, reset, cotangents):
    out, vjp = jax.vjp(
      lambda inputs: call(inputs | {"reset": reset}, **options), inputs
    )
    return out, vjp(cotangents)[0]

  return fast_jit(run)


def _values_and_vjp(inputs, **options):
  """Outputs, final state, and the gradients to all float arguments."""
  b, h, t, k = inputs["x"].shape
  e = inputs["u"].shape[-1]
  rng = np.random.default_rng(1)
  dtype = inputs["weight"].dtype
  cotangents = LinearRuleOutput(
    outputs=jnp.asarray(rng.normal(size=(b, h, t, e)), inputs["u"].dtype),
    weight=jnp.asarray(rng.normal(size=(b, h, e, k)), dtype),
    momentum=(
      None
      if inputs["momentum"] is None
      else jnp.asarray(rng.normal(size=(b, h, e, k)), dtype)
    ),
  )
  floats = {name: v for name, v in inputs.items() if name != "reset"}
  return _compiled_vjp(**options)(floats, inputs["reset"], cotangents)


# -------------------------------------------------- chunks = token by token

_ALL_OPTIONS = [
  (16, read, momentum, erase)
  for read in ("pre", "post")
  for momentum in (True, False)
  for erase in (True, False)
]
_OTHER_LENGTHS = [
  (chunk_length, *options)
  for chunk_length in (1, 3, 64)
  for options in (
    ("pre", True, True),
    ("post", True, True),
    ("post", False, False),
  )
]


@pytest.mark.parametrize(
  "chunk_length, read, momentum, erase", _ALL_OPTIONS + _OTHER_LENGTHS
)
def test_chunks_equal_reference_values_and_vjps(
  chunk_length, read, momentum, erase
):
  # 70 tokens: the last chunk is incomplete for every length but 1.
  inputs = random_inputs(
    momentum=momentum, erase=erase, zeros=True, resets=True
  )
  options = dict(read=read, chunk_length=chunk_length)
  got = _values_and_vjp(inputs, implementation="xla", **options)
  options["chunk_length"] = 1  # one compilation of the loop for all lengths
  want = _values_and_vjp(inputs, implementation="reference", **options)
  assert_close(got, want, 1e-10)


def test_chunks_equal_reference_without_resets():
  # Chunks longer than the sequence.
  inputs = random_inputs(zeros=True)
  got = _values_and_vjp(inputs, chunk_length=100)
  want = _values_and_vjp(inputs, chunk_length=1, implementation="reference")
  assert_close(got, want, 1e-10)


def test_xla_does_not_depend_on_checkpoint_policy():
  inputs = random_inputs(erase=False, zeros=True, resets=True)
  # 70 chunks, above the scan's threshold: "sqrt" has groups and a remainder.
  want = _values_and_vjp(inputs, chunk_length=1, checkpoint="none")
  for checkpoint in ("chunk", "sqrt"):
    got = _values_and_vjp(inputs, chunk_length=1, checkpoint=checkpoint)
    assert_close(got, want, 1e-13)


def test_without_queries_only_the_state_is_computed():
  inputs = random_inputs(resets=True)
  run = fast_jit(functools.partial(call, chunk_length=16))
  want = run(inputs)
  got = run(inputs | {"queries": None})
  assert got.outputs is None
  assert_close(got, want._replace(outputs=None), 1e-13)


def test_gradients_at_exact_zeros_equal_differences():
  """Guards the reference as well: no autodiff in what is compared with."""
  inputs = random_inputs((1, 1, 9, 2, 2))
  name_by_token = {"retention": (2, 6), "momentum_decay": (0, 6)}
  for name, tokens in name_by_token.items():
    inputs[name] = inputs[name].at[..., tokens].set(0)

  def loss(values):
    out = call(inputs | values, chunk_length=4)
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out))

  values = {name: inputs[name] for name in name_by_token}
  grads = fast_jit(jax.grad(loss))(values)
  loss = fast_jit(loss)
  for name in name_by_token:
    for token in range(9):
      # One-sided, as decays are not negative; second order in the step.
      step = 1e-5
      at = [
        loss(values | {name: values[name].at[..., token].add(n * step)})
        for n in (0, 1, 2)
      ]
      slope = (-3 * at[0] + 4 * at[1] - at[2]) / (2 * step)
      np.testing.assert_allclose(
        grads[name][0, 0, token], slope, rtol=1e-6, atol=1e-8
      )


# ------------------------------------------------------------- precision
# All of one shape: they share the compiled token loop in float64.


def _cast(inputs, dtype, names):
  return inputs | {name: inputs[name].astype(dtype) for name in names}


def _precision_inputs():
  inputs = random_inputs((1, 2, 150, 32, 32), zeros=True, resets=True)
  return inputs, set(inputs) - {"reset"}


def _reference64(inputs, names):
  inputs = _cast(inputs, jnp.float64, names)
  return _values_and_vjp(inputs, chunk_length=1, implementation="reference")


def test_float32_is_close_to_float64():
  inputs, names = _precision_inputs()
  inputs = _cast(inputs, jnp.float32, names)
  got = _values_and_vjp(inputs, chunk_length=64)
  assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32")}
  assert_close(got, _reference64(inputs, names), 1e-5 * 64**0.5)


@pytest.mark.parametrize("chunk_length", [16, 64])
def test_decays_of_any_size_keep_float32(chunk_length):
  """From 1 to 1e-30 and 0 side by side, each chunk with several."""
  inputs, names = _precision_inputs()
  rng = np.random.default_rng(2)
  for name in ("retention", "momentum_decay"):
    shape = inputs[name].shape
    small = 10.0 ** -rng.uniform(0, 30, shape) * (rng.uniform(size=shape) < 0.8)
    usual = rng.uniform(size=shape) < 0.7
    inputs[name] = jnp.where(usual, inputs[name], small)
  inputs = _cast(inputs, jnp.float32, names)
  got = _values_and_vjp(inputs, chunk_length=chunk_length)
  assert_close(got, _reference64(inputs, names), 1e-5 * chunk_length**0.5)


def test_float32_with_correlated_keys_is_close_to_float64():
  """Cosine 0.9, erase 1, chunks of 64: breaks series and low precision."""
  inputs, names = _precision_inputs()
  noise = inputs["x"]
  keys = 0.9**0.5 * noise[:, :, :1] + 0.1**0.5 * noise
  inputs["x"] = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
  cosines = jnp.einsum("BHCK,BHDK->BHCD", inputs["x"], inputs["x"])
  assert 0.85 < float(jnp.mean(cosines)) < 0.95
  for name in ("retention", "step_size", "erase"):
    inputs[name] = jnp.ones_like(inputs[name])
  inputs["momentum_decay"] = jnp.zeros_like(inputs["momentum_decay"])
  inputs["reset"] = jnp.zeros_like(inputs["reset"])
  inputs = _cast(inputs, jnp.float32, names)
  got = _values_and_vjp(inputs, chunk_length=64)
  assert_close(got, _reference64(inputs, names), 1e-5 * 64**0.5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_bfloat16_tokens_keep_a_float32_state(implementation):
  inputs, names = _precision_inputs()
  inputs = _cast(inputs, jnp.float32, names)
  inputs = _cast(inputs, jnp.bfloat16, ("x", "u", "queries"))
  got = _values_and_vjp(inputs, chunk_length=64, implementation=implementation)
  assert got[0].outputs.dtype == jnp.bfloat16
  assert got[0].weight.dtype == got[0].momentum.dtype == jnp.float32
  for name, gradient in got[1].items():
    assert gradient.dtype == inputs[name].dtype
  want = _reference64(inputs, names)
  assert_close(got, want, 2e-2)
  # The state has seen no bfloat16 arithmetic.
  assert_close(got[0].weight, want[0].weight, 1e-4)


# -------------------------------------------------------------- causality


@pytest.mark.parametrize("read", ["pre", "post"])
def test_outputs_do_not_depend_on_later_tokens(read):
  inputs = random_inputs((1, 2, 40, 5, 3), resets=True)
  run = fast_jit(
    lambda inputs: call(inputs, read=read, chunk_length=16).outputs
  )
  before = np.asarray(run(inputs))
  reset = np.asarray(inputs["reset"])
  written = set(inputs) - {"weight", "momentum", "queries", "reset"}

  def halved(names, token):
    scale = jnp.ones(40).at[token].set(0.5)
    scales = {3: scale[None, None], 4: scale[None, None, :, None]}
    return inputs | {
      name: inputs[name] * scales[inputs[name].ndim] for name in names
    }

  for token in (0, 15, 16, 21, 39):
    # A token's own write is seen by the read after it only.
    after = np.asarray(run(halved(written, token)))
    seen = token if read == "post" else token + 1
    np.testing.assert_array_equal(after[:, :, :seen], before[:, :, :seen])
    if seen < 40:
      differs = (after[:, :, seen] != before[:, :, seen]).any(-1)
      forgotten = reset[:, :, seen] & (read == "pre")
      np.testing.assert_array_equal(differs, ~forgotten)
    after = run(halved({"queries"}, token))
    others = np.arange(40) != token
    np.testing.assert_array_equal(after[:, :, others], before[:, :, others])


def test_reset_hides_everything_before():
  """Also what zero retention would not: the erase and the pre-write read."""
  inputs = random_inputs((1, 2, 20, 5, 3))
  reset = jnp.zeros((1, 2, 20), bool).at[:, :, 10].set(True)
  run = fast_jit(functools.partial(call, chunk_length=8))
  whole = run(inputs | {"reset": reset})
  tokens = set(inputs) - {"weight", "momentum", "reset"}
  second = inputs | {name: inputs[name][:, :, 10:] for name in tokens}
  second |= dict(weight=inputs["weight"] * 0, momentum=inputs["momentum"] * 0)
  alone = run(second)
  got = whole._replace(outputs=whole.outputs[:, :, 10:])
  assert_close(got, alone, 1e-12)
