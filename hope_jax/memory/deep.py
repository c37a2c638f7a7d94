"""One deep memory over a sequence: read, take the gradient, write (eq. 86-90).

Per chunk, with M the memory at the chunk's first state (paper 8.2):

  target   vhat_t = M(v_t) (self-generated, eq. 87) or v_t
  error    u_t from loss_factor |M(k_t) - vhat_t|^2, `rules.layer_errors`
  write    both layers by the rule (P), `pallas_kernels.linear_rule`
  read     o_t = M_{t-1}(q_t) (token_pre, eq. 86), M_t(q_t) (token_post), or
           M(q_t) (chunk, eq. 90)

Titans is this with slow k, v, q and gates; Hope feeds it from
`self_modifying.py`.  Everything is float32.

Legend: B batch, H heads, T tokens, N chunks, C chunk length, K key dim,
F hidden, E output dim.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hope_jax.config import MemoryConfig
from hope_jax.memory import architectures, chunks, rules
from hope_jax.memory.architectures import Weights
from hope_jax.memory.rules import Gates
from pallas_kernels.linear_rule import chunked


class MemoryOutput(NamedTuple):
  """outputs [B, H, T, E]; the state after; scalars about the learning."""

  outputs: jax.Array
  state: chunks.ChunkState | None
  dynamics: dict[str, jax.Array] | None


def zero_state(
  initial: Any, batch_size: int, cfg: MemoryConfig
) -> dict[str, Any]:
  """D = 0 and S = 0: {"weight", "momentum"} of [B, *M_0], any tree of M_0."""
  zeros = jax.tree.map(
    lambda w: jnp.zeros((batch_size, *w.shape), jnp.float32), initial
  )
  return {
    "weight": zeros,
    "momentum": None if cfg.momentum == "none" else zeros,
  }


def anchored(
  initial: Any, now: dict[str, Any], cfg: MemoryConfig
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
  """(slow part, fast state, fast state of a new document).

  With retention to the start the rule acts on the difference D; with the
  literal one (`zero`) on the whole matrix M_0 + D.
  """
  zero = jax.tree.map(jnp.zeros_like, now)
  if cfg.retention != "zero":
    return initial, now, zero
  add = lambda w: jax.tree.map(lambda a, b: a[None] + b, initial, w)
  return (
    None,
    {**now, "weight": add(now["weight"])},
    {**zero, "weight": add(zero["weight"])},
  )


def retained(retention: jax.Array, cfg: MemoryConfig) -> jax.Array:
  """alpha, or 1 where the memory does not forget."""
  return jnp.ones_like(retention) if cfg.retention == "none" else retention


def write_layers(
  keys: architectures.Trace,
  errors: Weights,
  now: dict[str, Any],
  gates: Gates,
  decays: chunked.ChunkDecays,
  cfg: MemoryConfig,
  *,
  divide: Weights,
  queries: jax.Array | None = None,
  slow: Weights | None = None,
  is_chunk_start: bool = True,
) -> tuple[jax.Array | None, dict[str, Any]]:
  """Applies (P) to both layers; token-exact read where `queries` are given.

  `divide` is the chunk length that step and erase are divided by, per layer.
  `is_chunk_start`: `now` is the state of `keys`, whose products are reused.
  """
  read = "post" if cfg.read == "token_post" else "pre"
  momentum = now["momentum"] or Weights(None, None)
  weight = now["weight"]

  def layer(index, queries):
    step, erase = rules.layer_rates(
      keys.inputs[index], gates, cfg, divide[index]
    )
    out = chunked.chunk_rule(
      keys.inputs[index],
      errors[index],
      weight=weight[index],
      momentum=momentum[index],
      decays=decays,
      learn_rate=step,
      erase=erase,
      queries=queries,
      read=read,
      x_weight=keys.fast[index] if is_chunk_start else None,
    )
    if queries is None:
      return None, out
    slow_part = None if slow is None else slow[index]
    return architectures.add(
      architectures.apply_slow(queries, slow_part), out.outputs
    ), out

  if weight.hidden is None:
    outputs, out = layer(1, queries)
    hidden = None
  else:
    z, hidden = layer(0, queries)
    features = None if z is None else architectures.activate(
      z, cfg.activation
    )[0]
    outputs, out = layer(1, features)
    if outputs is not None and architectures.is_residual(weight):
      outputs = outputs + queries
  return outputs, {
    "weight": Weights(hidden.weight if hidden else None, out.weight),
    "momentum": None
    if now["momentum"] is None
    else Weights(hidden.momentum if hidden else None, out.momentum),
  }


def chunk_divisors(cfg: MemoryConfig, chunk_length: int, exact: bool):
  """Per layer: the configured chunk length, or 1 (sum, or token-exact)."""
  divide = chunk_length if cfg.step_scale == "mean" else 1
  return Weights(divide, 1 if exact else divide)


def run_memory(
  initial: Weights,
  keys: jax.Array,
  values: jax.Array,
  queries: jax.Array,
  gates: Gates,
  cfg: MemoryConfig,
  *,
  state: chunks.ChunkState | None = None,
  segments: jax.Array | None = None,
  live: bool = True,
  with_dynamics: bool = False,
) -> MemoryOutput:
  """Reads and writes one memory per head along the sequence.

  Args:
    initial: M_0, hidden [H, F, K] (None: matrix memory), output [H, E, F].
    keys, values, queries: [B, H, T, K] (values [B, H, T, E]).
    gates: [B, H, T] each.
    state: from an earlier call or `zero_state`, None: a new sequence.
    segments: [B, T] document numbers.
    live: off: nothing is written, o_t = M_0(q_t) (the twin).
    with_dynamics: also returns what `dynamics_of` says.
  """
  if not live:
    trace = architectures.forward(initial, None, queries, cfg.activation)
    return MemoryOutput(trace.outputs, state, None)
  chunk_length = cfg.chunk_length
  layout = chunks.plan(keys.shape[2], chunk_length, state)
  continued = state is not None
  if state is None:
    state = chunks.fresh(zero_state(initial, keys.shape[0], cfg))
  slow, now, origin = anchored(initial, state.now, cfg)
  start = anchored(initial, {**state.now, "weight": state.start}, cfg)[1]
  exact = cfg.setting == "token_exact"
  divide = chunk_divisors(cfg, chunk_length, exact)
  gates = gates._replace(retention=retained(gates.retention, cfg))
  xs = jax.tree.map(
    lambda x: layout.split(x, axis=2), (keys, values, queries, gates)
  )
  live_places = None
  if layout.live is not None:
    live_places = jnp.broadcast_to(
      layout.live[:, None, None], xs[3].retention.shape
    )
  decays = chunked.chunk_decays(
    xs[3].retention, xs[3].momentum_decay, live=live_places
  )

  def step(start, now, inputs, _):
    (k, v, q, gates), decays = inputs
    trace = architectures.forward(slow, start, k, cfg.activation)
    targets = v
    if cfg.target == "self":
      targets = architectures.forward(slow, start, v, cfg.activation).outputs
    errors = rules.layer_errors(
      slow, start, trace, targets, cfg, token_exact=exact
    )
    token_read = cfg.read != "chunk"
    outputs, after = write_layers(
      trace,
      errors,
      now,
      gates,
      decays,
      cfg,
      divide=divide,
      queries=q if token_read else None,
      slow=slow,
      is_chunk_start=not continued,
    )
    if not token_read:
      outputs = architectures.forward(slow, start, q, cfg.activation).outputs
    dynamics = None
    if with_dynamics:
      dynamics = dynamics_of(
        initial, slow, trace, targets, gates, after, cfg, k
      )
    return after, (outputs, dynamics)

  resets = chunks.chunk_resets(segments, layout)
  (outputs, dynamics), state = chunks.scan_chunks(
    step,
    chunks.ChunkState(now, start["weight"], state.position),
    (xs, decays),
    layout,
    chunk_length=chunk_length,
    policy=cfg.remat,
    continued=continued,
    resets=None if resets is None else (resets, origin),
  )
  if dynamics is not None:
    dynamics = summarize(dynamics)
  return MemoryOutput(
    layout.merge(outputs, axis=2),
    difference(initial, state, cfg),
    dynamics,
  )


def difference(
  initial: Any, state: chunks.ChunkState | None, cfg: MemoryConfig
) -> chunks.ChunkState | None:
  """The state as differences from M_0, whatever the rule acts on."""
  if state is None or cfg.retention != "zero":
    return state
  minus = lambda w: jax.tree.map(lambda a, b: b - a[None], initial, w)
  return state.replace(
    now={**state.now, "weight": minus(state.now["weight"])},
    start=minus(state.start),
  )


def dynamics_of(
  initial, slow, trace, targets, gates, after, cfg, keys
) -> dict[str, jax.Array]:
  """What one chunk's learning did; scalars, means over batch and heads.

  learn_rate (eta), half_life (tokens), relative_change |D| / |M_0|, inner
  loss at the chunk's first and last state, clip_rate (share of output errors
  above error_clip).
  """
  error = trace.outputs - targets
  later = architectures.forward(
    slow, after["weight"], keys, cfg.activation
  ).outputs
  norm = jnp.sqrt(jnp.sum(jnp.square(error), axis=-1))
  scale = 2.0 * cfg.loss_factor
  loss = lambda e: cfg.loss_factor * jnp.mean(jnp.sum(jnp.square(e), -1))
  return {
    "learn_rate": jnp.mean(gates.learn_rate),
    "half_life": jnp.median(
      jnp.log(0.5) / jnp.minimum(jnp.log(gates.retention), -1e-9)
    ),
    "relative_change": relative_change(initial, after["weight"], slow is None),
    "loss_before": loss(error),
    "loss_after": loss(later - targets),
    "clip_rate": jnp.mean(scale * norm > (cfg.error_clip or jnp.inf)),
  }


def relative_change(initial: Weights, weight: Weights, whole: bool):
  """Median over batch and heads of |D| / |M_0|, both layers together."""

  def square(tree, axes):
    return sum(jnp.sum(jnp.square(w), axis=axes) for w in jax.tree.leaves(tree))

  change = weight
  if whole:
    change = jax.tree.map(lambda w, m: w - m[None], weight, initial)
  return jnp.median(
    jnp.sqrt(square(change, (-2, -1)) / square(initial, (-2, -1))[None])
  )


def summarize(dynamics: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Chunks [N] -> one number: the last chunk's change, else the mean."""
  return {
    name: x[-1] if name == "relative_change" else jnp.mean(x)
    for name, x in dynamics.items()
  }
