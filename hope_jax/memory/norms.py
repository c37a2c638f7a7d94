"""Norms without parameters, in float32 over the last axis."""

import jax
import jax.numpy as jnp


def rms_normalize(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
  """x / rms(x) over the last axis, in float32, without a scale."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return x * jax.lax.rsqrt(
    jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon
  )


def l2_normalize(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
  """x / |x| over the last axis, in float32; 0 stays 0."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return x * jax.lax.rsqrt(
    jnp.sum(jnp.square(x), axis=-1, keepdims=True) + epsilon
  )


def layer_normalize(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
  """(x - mean) / std over the last axis, in float32, without scale and bias."""
  return rms_normalize(x - jnp.mean(x, axis=-1, keepdims=True), epsilon)


def layer_norm_error(x: jax.Array, error: jax.Array) -> jax.Array:
  """Backpropagates an error at layer_normalize(x) to x."""
  return jax.vjp(layer_normalize, x)[1](error)[0]
