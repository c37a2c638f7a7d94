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
    if cfg.setting == "chunk_dot":
      return -2 * cfg.loss_factor * jnp.vdot(y, target)
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
    found["output"] = clip(base + slow - target, cfg.target_clip)
  return found


def write(
  state, start, initial, k, target, gates, cfg, chunk, residual=True, exact=None
):
  """One token of S <- beta S - step u x^T, W <- W(alpha - erase x x^T) + S."""
  eta, alpha, beta = gates
  if cfg.retention == "none":
    alpha = jnp.ones_like(alpha)
  exact = cfg.is_exact if exact is None else exact
  inputs = layer_inputs(start, k)
  error = errors(start, initial, k, target, cfg, residual, exact)
  after = {"weight": {}, "momentum": {}}
  for name, x in inputs.items():
    rate = eta / (1 + eta * jnp.sum(x * x)) if cfg.proximal else eta
    is_exact = exact and name == "output"
    if is_exact and cfg.setting == "negative_eigenvalues":
      rate = eta / jnp.maximum(1, jnp.sum(x * x))
    if cfg.step_scale == "mean" and not is_exact:
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
  """Eq. 86-88 for one memory, gradients at the chunk's first state.

  Returns outputs, the state at the end, weights after every token.
  """

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
    return (start, after), (mlp(read, q), after["weight"])

  state = fresh(initial)
  xs = (jnp.arange(keys.shape[0]), keys, values, queries, gates)
  (_, state), (outputs, path) = jax.lax.scan(
    token, (state["weight"], state), xs
  )
  return outputs, state, path


def box_weights(initial, cfg):
  """`Boxes` [H, ...] as {box: {"hidden", "output"}}, heads in front."""
  kinds = {
    "projection": [box for box in ("k", "v", "q") if box in cfg.adaptive],
    "gate": [box for box in ("eta", "alpha") if box in cfg.adaptive],
  }
  boxes = [
    (kind, i, box) for kind in kinds for i, box in enumerate(kinds[kind])
  ]
  named = {
    box: {"output": getattr(initial, kind)[:, i]} for kind, i, box in boxes
  }
  if initial.hidden is not None:
    parts = jnp.split(initial.hidden, len(boxes), axis=1)
    for (_, _, box), hidden in zip(boxes, parts, strict=True):
      named[box]["hidden"] = hidden
  return named


def run_boxes(initial, slow, cfg):
  """Eq. 83-85, 87, 88: all adaptive boxes.

  Returns (k, v, q, eta, alpha), the state at the end, weights after each
  token.
  """
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
    if cfg.setting == "negative_eigenvalues":
      eta = 2 / (1 + jnp.exp(-logits["eta"]))
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
    weights = {box: state["weight"] for box, state in after.items()}
    return (start, after), ((k, v, q, eta, alpha), weights)

  states = {box: fresh(weights) for box, weights in initial.items()}
  xs = (jnp.arange(slow["k"].shape[0]), slow)
  (_, states), (made, path) = jax.lax.scan(token, (initial, states), xs)
  return made, states, path


def feed_forward(weights, n):
  gate, up, down = weights
  return (jax.nn.silu(n @ gate) * (n @ up)) @ down


def cms_step(start, now, n, k, value, rule):
  """One token of eq. 71: (y, weights after it), gradients by `jax.grad`.

  `start`: (gate, up, down) at the chunk's first token, `now`: what its tokens
  made of it; both as differences from `rule["slow"]`.
  """
  gate, up, down = (w + d for w, d in zip(rule["slow"], start, strict=True))
  error = clip(feed_forward((gate, up, down), k) - value, rule["error_clip"])

  def through(z_gate, z_up):
    return jnp.vdot(error, (jax.nn.silu(z_gate) * z_up) @ down)

  errors = jax.grad(through, (0, 1))(k @ gate, k @ up)
  hidden = jax.nn.silu(k @ gate) * (k @ up)
  steps = [(k, clip(e, rule["error_clip"])) for e in errors] + [(hidden, error)]
  rate = rule["learn_rate"]
  now = tuple(
    rule["alpha"] * weight
    - rate / (1 + rate * x @ x) / rule["chunk"] * jnp.outer(x, u)
    for weight, (x, u) in zip(now, steps, strict=True)
  )
  return feed_forward((gate, up, down), n), now


def run_cms_level(slow, n, values, learn_rate, chunk, error_clip, **other):
  """Eq. 71 for one level, token by token: read at the chunk's first state.

  Returns outputs, D at the end, D after every token.
  """
  rule = {
    "slow": slow,
    "learn_rate": learn_rate,
    "chunk": chunk,
    "error_clip": error_clip,
    "alpha": other.get("alpha", 1.0),
  }
  nothing = tuple(jnp.zeros_like(w) for w in slow)

  def token(carry, xs):
    start, now = carry
    t, n, k, value = xs
    start = choose(t % chunk == 0, now, start)
    y, now = cms_step(start, now, n, k, value, rule)
    return (start, now), (y, now)

  xs = (jnp.arange(n.shape[0]), n, other.get("keys", n), values)
  (_, after), (outputs, path) = jax.lax.scan(token, (nothing, nothing), xs)
  return outputs, after, path


def run_cms_nested(
  slow, x, values, scales, rules, frozen=(), keys=None, *, epsilon=1e-6
):
  """Eq. 72 token by token: levels in sequence on one block; where a level's
  chunk ends, the one before it (faster) goes on from its state."""
  nothing = tuple(jnp.zeros_like(w) for w in slow)

  def token(levels, xs):
    t, x, value, key = xs
    levels = list(levels)
    for i in reversed(range(len(rules))):
      start, now = levels[i]
      if i + 1 < len(rules):
        ends = t % rules[i + 1]["chunk"] == 0
        now = choose(ends, levels[i + 1][1], now)
      levels[i] = choose(t % rules[i]["chunk"] == 0, now, start), now
      if i in frozen:
        levels[i] = nothing, nothing
    for i, rule in enumerate(rules):
      n = x * scales[i] / jnp.sqrt(jnp.mean(x**2) + epsilon)
      start, now = levels[i]
      k = n if key is None else key
      y, now = cms_step(start, now, n, k, value, {**rule, "slow": slow})
      levels[i] = start, now
      x = x + y
    return tuple(levels), x

  levels = tuple((nothing, nothing) for _ in rules)
  xs = (jnp.arange(x.shape[0]), x, values, keys)
  levels, outputs = jax.lax.scan(token, levels, xs)
  return outputs, levels
