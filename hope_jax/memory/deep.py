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

from hope_jax.memory import architectures, chunks, fused, rules
from hope_jax.memory.architectures import Weights
from hope_jax.memory.rules import Gates
from hope_jax.model_config import MemoryConfig
from pallas_kernels.linear_rule import one_chunk as chunk_lib


class MemoryOutput(NamedTuple):
  """outputs [B, H, T, E]; the state after; scalars about the learning."""

  outputs: jax.Array
  state: chunks.ChunkState | None
  dynamics: dict[str, jax.Array] | None


def zero_state(
  initial: Any, batch_size: int, cfg: MemoryConfig
) -> dict[str, Any]:
  """D = 0 and S = 0: {"weight", "momentum"} of [B, *M_0], any tree of M_0."""
  zeros = chunks.zeros(initial, batch_size)
  return {
    "weight": zeros,
    "momentum": None if cfg.momentum == "none" else zeros,
  }


def anchored(
  initial: Any, state: chunks.ChunkState, cfg: MemoryConfig
) -> tuple[Any, chunks.ChunkState, dict[str, Any]]:
  """(M_0 if the rule acts on D, the state it acts on, a new document's state).

  With retention to the start the rule acts on the difference D; with the
  literal one (`zero`) on the whole matrix M_0 + D.
  """
  zero = jax.tree.map(jnp.zeros_like, state.now)
  if cfg.retention != "zero":
    return initial, state, zero
  add = lambda weight: architectures.whole(initial, weight)
  return None, state.map_weights(add), {**zero, "weight": add(zero["weight"])}


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
    segments: [B, T] document numbers (`memory/chunks.py`).
    live: off: nothing is written, o_t = M_0(q_t) (the twin).
    with_dynamics: also returns what `dynamics_of` says.
  """
  if not live:
    base = chunks.per_sequence(initial, keys.shape[0], ("heads",))
    trace = architectures.forward(base, queries, cfg.activation)
    return MemoryOutput(trace.outputs, state, None)
  layout = chunks.plan(keys.shape[2], cfg.chunk_length, state)
  continued = state is not None
  if state is None:
    state = chunks.fresh(zero_state(initial, keys.shape[0], cfg))
  slow, state, origin = anchored(initial, state, cfg)
  gates = gates._replace(retention=rules.retained(gates.retention, cfg))
  docs = chunks.documents(segments, layout, origin)
  how: dict[str, Any] = dict(
    chunk_length=cfg.chunk_length, continued=continued, docs=docs
  )
  if fused.can_run(cfg, layout) and not with_dynamics:
    tokens = keys, values, queries, gates
    outputs, state = fused.run(
      fused_chunk, initial, state, tokens, cfg, name="memory", **how
    )
    return MemoryOutput(outputs, difference(initial, state, cfg), None)

  base = chunks.per_sequence(slow, keys.shape[0], ("heads",))

  def step(start, now, inputs, places):
    (k, v, query, gates), decays = inputs
    loss = inner_loss(start, base, k, v, cfg)
    after, read = learn_chunk(start, now, loss, k, query, gates, decays, cfg)
    dynamics = None
    if with_dynamics:
      dynamics = dynamics_of(
        initial, after, gates, k, cfg, base, loss, live=places
      )
    return after, (read, dynamics)

  xs = _by_chunk(base, keys, values, queries, gates, layout, cfg)
  (read, dynamics), state = chunks.scan_chunks(
    step, state, xs, layout, policy=cfg.remat, **how
  )
  if dynamics is not None:
    dynamics = summarize(dynamics)
  read = jax.tree.map(lambda x: layout.merge(x, axis=2), read)
  return MemoryOutput(
    read_out(base, queries, read),
    difference(initial, state, cfg),
    dynamics,
  )


def _by_chunk(
  slow: Weights | None,
  keys: jax.Array,
  values: jax.Array,
  queries: jax.Array,
  gates: Gates,
  layout: chunks.Layout,
  cfg: MemoryConfig,
) -> tuple[Any, chunk_lib.ChunkDecays]:
  """The scan's inputs: ((k, v, (q, its slow product), gates), decays)."""
  xs = jax.tree.map(
    lambda x: layout.split(x, axis=2),
    (keys, values, (queries, slow_hidden(slow, queries)), gates),
  )
  return xs, rules.subchunk_decays(xs[3], layout.live, rules.rule_read(cfg))


def slow_hidden(slow: Weights | None, queries: jax.Array) -> jax.Array | None:
  """The part of the queries' hidden layer that no chunk changes."""
  if slow is None or slow.hidden is None:
    return None
  return architectures.apply(queries, slow.hidden)


class InnerLoss(NamedTuple):
  """The inner loss of a chunk's tokens at its first state.

  features are the output layer's inputs [B, H, C, F], errors dL/dy per layer.
  """

  features: jax.Array
  errors: Weights
  predictions: jax.Array
  targets: jax.Array


def inner_loss(
  start: Weights,
  slow: Weights | None,
  keys: jax.Array,
  values: jax.Array,
  cfg: MemoryConfig,
) -> InnerLoss:
  """Forward and backward of loss_factor |M(k) - vhat|^2, analytically.

  Setting A (`cfg.is_exact`) replaces the output layer's error by M_0's
  prediction - vhat, clipped, which is constant in D: the erase term completes
  the error token by token.
  """
  whole = architectures.whole(slow, start)
  trace = architectures.forward(whole, keys, cfg.activation)
  predictions, features = trace.outputs, trace.inputs.output
  targets = values
  if cfg.target == "self":
    targets = architectures.forward(whole, values, cfg.activation).outputs
  error = rules.output_error(predictions, targets, cfg)
  hidden = None
  if trace.slope is not None:
    hidden = rules.clip_norm(
      architectures.hidden_error(whole.output, error, trace.slope),
      cfg.error_clip,
    )
  if cfg.is_exact:
    fast = architectures.apply(features, start.output)
    error = rules.clip_norm(predictions - targets - fast, cfg.target_clip)
  return InnerLoss(features, Weights(hidden, error), predictions, targets)


def learn_chunk(
  start: Weights,
  now: dict[str, Any],
  loss: InnerLoss,
  keys: jax.Array,
  query: tuple[jax.Array, jax.Array | None],
  gates: Gates,
  decays: Any,
  cfg: MemoryConfig,
  arithmetic: chunk_lib.Arithmetic = chunk_lib.XLA,
) -> tuple[dict[str, Any], Weights]:
  """One chunk of writes and reads: (state after, what was read).

  Args:
    start: fast weights at the chunk's first state.
    now: fast state before the chunk's tokens given here.
    loss: the gradients, taken at `start`.
    query: q_t [B, H, C, K] and the slow part of its hidden layer.

  Returns:
    What was read: the hidden features of the queries (None: matrix) and the
    output layer's fast part, for `read_out`.
  """
  weight, momentum = now["weight"], now["momentum"] or Weights(None, None)

  def layer(index, inputs, queries, *, exact=False) -> tuple[Any, Any]:
    """Writes one layer and reads its fast part at the queries."""
    token_read = cfg.read != "chunk"
    out = rules.write_layer(
      inputs,
      loss.errors[index],
      weight[index],
      momentum[index],
      gates,
      decays,
      cfg,
      chunk_length=cfg.chunk_length,
      exact=exact,
      queries=queries if token_read else None,
      arithmetic=arithmetic,
    )
    if token_read:
      return out, out.outputs
    return out, architectures.apply(queries, start[index])

  hidden: Any = None
  features, slow_hidden = query
  if weight.hidden is not None:
    hidden, z = layer(0, keys, features)
    z = z if slow_hidden is None else slow_hidden + z
    features = architectures.activate(z, cfg.activation)[0]
  output, fast = layer(1, loss.features, features, exact=cfg.is_exact)
  after: dict[str, Any] = {
    "weight": Weights(hidden and hidden.weight, output.weight),
    "momentum": None,
  }
  if now["momentum"] is not None:
    after["momentum"] = Weights(hidden and hidden.momentum, output.momentum)
  return after, Weights(hidden and features, fast)


def fused_chunk(
  initial: Weights,
  now: dict[str, Any],
  tokens: tuple[jax.Array, jax.Array, jax.Array, Gates],
  live: jax.Array | None,
  cfg: MemoryConfig,
) -> tuple[jax.Array, dict[str, Any]]:
  """One chunk of one head in a kernel: (o [C, E], state after)."""
  keys, values, queries, gates = tokens
  slow = None if cfg.retention == "zero" else initial
  when = rules.rule_read(cfg)
  decays = rules.subchunk_decays(gates, live, when, fused.KERNEL)
  loss = inner_loss(now["weight"], slow, keys, values, cfg)
  query = queries, slow_hidden(slow, queries)
  after, read = learn_chunk(
    now["weight"], now, loss, keys, query, gates, decays, cfg, fused.KERNEL
  )
  return read_out(slow, queries, read), after


def read_out(
  slow: Weights | None, queries: jax.Array, read: Weights
) -> jax.Array:
  """o = q + h M_0 + h D (mlp) or q M_0 + q D (matrix); the slow product of
  all tokens at once."""
  features = queries if read.hidden is None else read.hidden
  outputs = read.output
  if slow is not None:
    outputs = architectures.apply(features, slow.output) + outputs
  return outputs if read.hidden is None else queries + outputs


def difference(
  initial: Any, state: chunks.ChunkState | None, cfg: MemoryConfig
) -> chunks.ChunkState | None:
  """The state as differences from M_0, whatever the rule acts on."""
  if state is None or cfg.retention != "zero":
    return state
  minus = lambda w: jax.tree.map(lambda a, b: b - a[None], initial, w)
  return state.map_weights(minus)


def dynamics_of(
  initial: Weights,
  after: dict[str, Any],
  gates: Gates,
  keys: jax.Array,
  cfg: MemoryConfig,
  slow: Weights | None,
  loss: InnerLoss,
  *,
  live: jax.Array | None = None,
) -> dict[str, jax.Array]:
  """What one chunk's learning did; scalars, means over batch and heads.

  learn_rate (eta), half_life (tokens), relative_change |D| / |M_0|, inner
  loss at the chunk's first and last state, clip_rate (share of output errors
  above error_clip).  `live` [C]: which places hold a token, None if all do.
  """
  weight = after["weight"]
  final = architectures.whole(slow, weight)
  later = architectures.forward(final, keys, cfg.activation).outputs
  return {
    "learn_rate": mean(gates.learn_rate, live),
    "half_life": half_life(gates.retention, live),
    "relative_change": relative_change(initial, weight, slow is None),
    **loss_dynamics(
      loss.predictions,
      later,
      loss.targets,
      cfg.loss_factor,
      cfg.error_clip,
      is_dot=cfg.setting == "chunk_dot",
      live=live,
    ),
  }


def mean(x: jax.Array, live: jax.Array | None) -> jax.Array:
  """Over all places [..., C] that hold a token."""
  if live is None:
    return jnp.mean(x)
  count = jnp.sum(live) * (x.size // live.size)
  return jnp.sum(jnp.where(live, x, 0)) / count


def half_life(retention: jax.Array, live: jax.Array | None = None) -> jax.Array:
  """Median number of tokens after which half is forgotten."""
  tokens = jnp.log(0.5) / jnp.minimum(jnp.log(retention), -1e-9)
  if live is None:
    return jnp.median(tokens)
  return jnp.nanmedian(jnp.where(live, tokens, jnp.nan))


def loss_dynamics(
  before: jax.Array,
  after: jax.Array,
  targets: jax.Array,
  loss_factor: float,
  error_clip: float,
  *,
  is_dot: bool = False,
  live: jax.Array | None = None,
) -> dict[str, jax.Array]:
  """Inner loss of a chunk at its first and last state, and the clip rate.

  `is_dot`: the loss is -2 loss_factor <M(k), target>.
  """

  def loss(outputs):
    if is_dot:
      return -2.0 * jnp.sum(outputs * targets, axis=-1)
    return jnp.sum(jnp.square(outputs - targets), axis=-1)

  error = targets if is_dot else before - targets
  norm = 2.0 * loss_factor * jnp.linalg.norm(error, axis=-1)
  return {
    "loss_before": loss_factor * mean(loss(before), live),
    "loss_after": loss_factor * mean(loss(after), live),
    "clip_rate": mean(norm > (error_clip or jnp.inf), live),
  }


def relative_change(initial: Any, weight: Any, is_whole: bool = False):
  """Median over batch (and heads) of |D| / |M_0|, all layers together."""
  change = weight
  if is_whole:
    change = jax.tree.map(lambda w, m: w - m[None], weight, initial)

  def square(tree):
    squares = [
      jnp.sum(jnp.square(w), axis=(-2, -1)) for w in jax.tree.leaves(tree)
    ]
    return sum(squares[1:], squares[0])

  return jnp.median(jnp.sqrt(square(change) / square(initial)[None]))


def summarize(dynamics: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Chunks [N] -> one number: the last chunk's change, else the mean."""
  return {
    name: x[-1] if name == "relative_change" else jnp.mean(x)
    for name, x in dynamics.items()
  }
