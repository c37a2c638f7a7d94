"""What a memory is: a residual MLP (eq. 89) or a matrix, read at one state.

  mlp     M(x) = x + W1 act(W2 x)     (no residual where E != K: the gates)
  matrix  M(x) = W1 x

with W = M_0 + D: M_0 the learned start (slow), D the fast difference. The two
products are kept apart, so D = 0 is the slow model bit for bit.

Legend: B batch, H heads, C tokens, K key dim, F hidden, E output dim;
"..." are B, H and possibly a number G of memories side by side.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}


def rms_normalize(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
  """x / rms(x) over the last axis, in float32, without a scale."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(
    jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon
  )


def l2_normalize(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
  """x / |x| over the last axis, in float32; 0 stays 0."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(
    jnp.sum(jnp.square(x), axis=-1, keepdims=True) + epsilon
  )


class Weights(NamedTuple):
  """One value per layer: hidden [..., F, K] (None: matrix), output [..., E, F].

  Also used for what belongs to a layer: states, inputs, errors.
  """

  hidden: jax.Array | None
  output: jax.Array


class Trace(NamedTuple):
  """A forward pass: the layers' inputs, act'(z) and the outputs.

  `fast` are the products with D alone, which the learning rule needs again.
  """

  inputs: Weights
  slope: jax.Array | None
  outputs: jax.Array
  fast: Weights


def apply_slow(x: jax.Array, weight: jax.Array | None) -> jax.Array | None:
  """x [B, H, (G), C, K], M_0 [H, (G), F, K] -> [B, H, (G), C, F]."""
  if weight is None:
    return None
  if weight.ndim == 3:
    return jnp.einsum("BHCK,HFK->BHCF", x, weight)
  return jnp.einsum("BHGCK,HGFK->BHGCF", x, weight)


def apply_fast(x: jax.Array, weight: jax.Array) -> jax.Array:
  """x [..., C, K], D [..., F, K] -> [..., C, F]."""
  return jnp.einsum("...CK,...FK->...CF", x, weight)


def add(slow: jax.Array | None, fast: jax.Array | None) -> jax.Array:
  """x M_0 + x D, either of which may be absent."""
  if slow is None:
    assert fast is not None
    return fast
  return slow if fast is None else slow + fast


def activate(z: jax.Array, activation: str) -> tuple[jax.Array, jax.Array]:
  """act(z) and act'(z)."""
  function = ACTIVATIONS[activation]
  return jax.jvp(function, (z,), (jnp.ones_like(z),))


def forward(
  initial: Weights | None,
  fast: Weights | None,
  x: jax.Array,
  activation: str,
) -> Trace:
  """M(x) with W = `initial` + `fast`, one of which may be None (zero)."""
  weights = initial if initial is not None else fast
  assert weights is not None

  def layer(inputs, index):
    slow = None if initial is None else apply_slow(inputs, initial[index])
    quick = None if fast is None else apply_fast(inputs, fast[index])
    return add(slow, quick), quick

  if weights.hidden is None:
    outputs, quick = layer(x, 1)
    return Trace(Weights(None, x), None, outputs, Weights(None, quick))
  z, quick_hidden = layer(x, 0)
  features, slope = activate(z, activation)
  outputs, quick_output = layer(features, 1)
  if is_residual(weights):
    outputs = outputs + x
  return Trace(
    Weights(x, features),
    slope,
    outputs,
    Weights(quick_hidden, quick_output),
  )


def is_residual(weights: Weights) -> bool:
  """Whether M(x) = x + ...: an MLP whose output is as wide as its input."""
  return (
    weights.hidden is not None
    and weights.output.shape[-2] == weights.hidden.shape[-1]
  )


def backward_hidden(
  initial: Weights | None,
  fast: Weights | None,
  error: jax.Array,
  slope: jax.Array,
) -> jax.Array:
  """Error of the hidden layer, (W1^T error) * act'(z): [..., C, F]."""
  total = None
  if initial is not None:
    equation = (
      "BHCE,HEF->BHCF" if initial.output.ndim == 3 else "BHGCE,HGEF->BHGCF"
    )
    total = jnp.einsum(equation, error, initial.output)
  if fast is not None:
    quick = jnp.einsum("...CE,...EF->...CF", error, fast.output)
    total = add(total, quick)
  assert total is not None
  return total * slope
