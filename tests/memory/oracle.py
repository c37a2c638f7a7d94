"""Token loops written from the equations, with `jax.grad` as inner gradient.

One sequence and one head; a memory is a dict of matrices.  Slow and plain on
purpose: the tests compare the chunk-parallel code with these.
"""

import jax
import jax.numpy as jnp


def mlp(weights, x, residual=True):
  """x + W1 silu(W2 x) (eq. 89); a matrix memory has no W2."""
  if "hidden" not in weights:
    return weights["output"] @ x
  y = weights["output"] @ jax.nn.silu(weights["hidden"] @ x)
  return x + y if residual else y


def layer_inputs(weights, x):
  if "hidden" not in weights:
    return {"output": x}
  return {"hidden": x, "output": jax.nn.silu(weights["hidden"] @ x)}


def clip(error, bound):
  norm = jnp.linalg.norm(error)
  return error * jnp.minimum(1.0, bound / norm) if bound else error


def errors(weights, initial, k, target, cfg, residual, exact=False):
  """dL/dy of both layers by jax.grad, clipped as the configuration says."""

  def output_loss(y):
    return cfg.loss_factor * jnp.sum((y - target) ** 2)

  y = mlp(weights, k, residual)
  output = clip(jax.grad(output_loss)(y), cfg.error_clip)
  found = {"output": output}
  if "hidden" in weights:
    z = weights["hidden"] @ k

    def through_hidden(z):
      return jnp.vdot(output, weights["output"] @ jax.nn.silu(z))

    found["hidden"] = clip(jax.grad(through_hidden)(z), cfg.error_clip)
  if exact:
    x = layer_inputs(weights, k)["output"]
    slow = initial["output"] @ x if cfg.retention != "zero" else 0.0
    base = k if "hidden" in weights and residual else 0.0
    found["output"] = base + slow - target
  return found


def write(
  state, start, initial, k, target, gates, cfg, chunk, residual=True, exact=None
):
  """One token of S <- beta S - step u x^T, W <- W(alpha - erase x x^T) + S."""
  eta, alpha, beta = gates
  if cfg.retention == "none":
    alpha = jnp.ones_like(alpha)
  exact = cfg.setting == "token_exact" if exact is None else exact
  inputs = layer_inputs(start, k)
  error = errors(start, initial, k, target, cfg, residual, exact)
  after = {"weight": {}, "momentum": {}}
  for name, x in inputs.items():
    rate = eta / (1 + eta * jnp.sum(x * x)) if cfg.proximal else eta
    if cfg.step_scale == "mean" and not (exact and name == "output"):
      rate = rate / chunk
    erase = {"proximal": alpha * rate, "literal": rate, "none": 0.0}
    step = rate * (1 - beta) if cfg.momentum == "averaged" else rate
    decay = 0.0 if cfg.momentum == "none" else beta
    momentum = decay * state["momentum"][name] - step * jnp.outer(
      error[name], x
    )
    anchor = initial[name] if cfg.retention != "zero" else 0.0
    weight = state["weight"][name] - anchor
    weight = (
      alpha * weight
      - erase[cfg.delta_rule] * jnp.outer(weight @ x, x)
      + momentum
    )
    after["weight"][name] = weight + anchor
    after["momentum"][name] = momentum
  return after


def fresh(initial):
  return {
    "weight": dict(initial),
    "momentum": {k: jnp.zeros_like(w) for k, w in initial.items()},
  }


def choose(condition, a, b):
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def run_memory(initial, keys, values, queries, gates, cfg):
  """Eq. 86-88 for one memory, gradients at the chunk's first state."""

  def token(carry, xs):
    start, state = carry
    t, k, v, q, gates = xs
    start = choose(t % cfg.chunk_length == 0, state["weight"], start)
    target = mlp(start, v) if cfg.target == "self" else v
    after = write(
      state, start, initial, k, target, gates, cfg, cfg.chunk_length
    )
    read = {"chunk": start, "token_pre": state["weight"]}.get(
      cfg.read, after["weight"]
    )
    return (start, after), mlp(read, q)

  state = fresh(initial)
  xs = (jnp.arange(keys.shape[0]), keys, values, queries, gates)
  (_, state), outputs = jax.lax.scan(token, (state["weight"], state), xs)
  return outputs, state


def run_boxes(initial, slow, cfg):
  """Eq. 83-85, 87, 88: all adaptive boxes; returns k, v, q, eta, alpha."""
  unit = lambda x: x / jnp.sqrt(jnp.sum(x * x) + 1e-6)

  def token(carry, xs):
    start, states = carry
    t, at = xs
    now = {box: state["weight"] for box, state in states.items()}
    start = choose(t % cfg.projection_chunk_length == 0, now, start)
    vectors = {
      box: mlp(start[box], at[box]) if box in start else at[box]
      for box in ("k", "v", "q")
    }
    k, v, q = unit(vectors["k"]), vectors["v"], unit(vectors["q"])
    logits = {
      box: at[box]
      + (mlp(start[box], at["k"], False)[0] if box in start else 0.0)
      for box in ("eta", "alpha")
    }
    eta = jax.nn.softplus(logits["eta"])
    alpha = jnp.exp(-jax.nn.softplus(logits["alpha"]))
    after = {}
    for box in states:
      residual = box in ("k", "v", "q")
      after[box] = write(
        states[box],
        start[box],
        initial[box],
        k,
        mlp(start[box], v, residual),
        (eta, alpha, at["beta"]),
        cfg,
        cfg.projection_chunk_length,
        residual,
        exact=False,
      )
    return (start, after), (k, v, q, eta, alpha)

  states = {box: fresh(weights) for box, weights in initial.items()}
  xs = (jnp.arange(slow["k"].shape[0]), slow)
  (_, states), made = jax.lax.scan(token, (initial, states), xs)
  return made, states
