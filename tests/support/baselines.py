"""Token loops of TTT and Memora, with `jax.grad` as inner gradient.

One sequence and one head, as in `oracle.py`.
"""

import jax
import jax.numpy as jnp

from tests.support.oracle import choose, clip


def layer_norm(z):
  return (z - z.mean()) / jnp.sqrt(z.var() + 1e-6)


def ttt(weights, norm, x):
  """x + LN(W x + b), or with a hidden layer of gelu."""
  h = x
  if "hidden" in weights:
    weight, bias = weights["hidden"]
    h = jax.nn.gelu(weight @ x + bias)
  weight, bias = weights["output"]
  return x + layer_norm(weight @ h + bias) * norm[0] + norm[1]


def run_ttt(initial, norm, keys, values, queries, rates, learned, chunk):
  """W_t = W_start + c_t D_t; gradients at the mini-batch's first state."""
  factors = jnp.maximum(0, 1 / jnp.arange(1, chunk + 1) + learned)
  after = lambda start, change, c: jax.tree.map(
    lambda w, d: w + c * d, start, change
  )

  def token(carry, xs):
    start, change = carry
    t, k, v, q, rate = xs
    is_first = t % chunk == 0
    start = choose(is_first, after(start, change, factors[-1]), start)
    change = jax.tree.map(lambda d: jnp.where(is_first, 0, d), change)
    loss = lambda w: jnp.sum((ttt(w, norm, k) - v) ** 2) / 2
    gradient = jax.grad(loss)(start)
    change = jax.tree.map(lambda d, g: d - rate * g, change, gradient)
    return (start, change), ttt(
      after(start, change, factors[t % chunk]), norm, q
    )

  xs = (jnp.arange(len(keys)), keys, values, queries, rates)
  nothing = jax.tree.map(jnp.zeros_like, initial)
  return jax.lax.scan(token, (initial, nothing), xs)[1]


def simplex(logits):
  return jax.tree.map(
    lambda z: z.shape[1] * jnp.exp(z) / jnp.exp(z).sum(1, keepdims=True), logits
  )


def memora(weights, x):
  h = jax.nn.gelu(weights["hidden"] @ x)
  return x + layer_norm(weights["output"] @ h)


def run_memora(initial, keys, values, queries, gates, cfg):
  """W_t = K softmax(alpha log W - eta grad), grad at the chunk's start."""

  def gradient(weights, k, v):
    z = weights["hidden"] @ k
    features = jax.nn.gelu(z)
    error = clip(memora(weights, k) - v, cfg.error_clip)
    through = lambda y: jnp.vdot(error, layer_norm(y))
    output = jax.grad(through)(weights["output"] @ features)
    hidden = jax.grad(
      lambda z: jnp.vdot(output, weights["output"] @ jax.nn.gelu(z))
    )(z)
    return {
      "hidden": jnp.outer(clip(hidden, cfg.error_clip), k),
      "output": jnp.outer(output, features),
    }

  def token(carry, xs):
    start, now = carry
    t, k, v, q, eta, alpha = xs
    start = choose(t % cfg.chunk_length == 0, now, start)
    read = start if cfg.read == "chunk" else now
    found = gradient(simplex(start), k, v)
    anchor = initial
    if cfg.retention == "zero":
      anchor = jax.tree.map(jnp.zeros_like, initial)
    now = jax.tree.map(
      lambda z, z0, g: z0 + alpha * (z - z0) - eta * g, now, anchor, found
    )
    read = now if cfg.read == "token_post" else read
    return (start, now), memora(simplex(read), q)

  xs = (jnp.arange(len(keys)), keys, values, queries, *gates)
  return jax.lax.scan(token, (initial, initial), xs)[1]
