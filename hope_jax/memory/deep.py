"""One deep memory over a sequence: read, take the gradient, write (eq. 86-90).

Per chunk, with M the memory at the chunk's first state (paper 8.2):

  target   vhat_t = M(v_t) (self-generated, eq. 87) or v_t
  error    u_t from loss_factor |M(k_t) - vhat_t|^2, `rules.output_error`
  write    both layers by the rule (P), `pallas_kernels.linear_rule`
  read     o_t = M_{t-1}(q_t) (token_pre, eq. 86), M_t(q_t) (token_post), or
           M(q_t) (chunk, eq. 90)

Titans is this memory with slow k, v, q and gates; in Hope they come from
`self_modifying.py`.  Everything is float32.

Legend: B batch, H heads, T tokens, N chunks, C chunk length, K key dim,
F hidden, E output dim.
"""

import dataclasses
from typing import NamedTuple

import jax
from flax.typing import ArrayPytree as Tree

from hope_jax.config import MemoryConfig
from hope_jax.memory import architectures, chunks, fused, rules
from hope_jax.memory import dynamics as dynamics_lib
from hope_jax.memory.architectures import Weights
from hope_jax.memory.chunks import MemoryOutput
from hope_jax.memory.rules import Gates
from pallas_kernels.linear_rule import one_chunk as chunk_lib


class Tokens(NamedTuple):
  """Inputs of the memory: keys, queries [B, H, T, K], values [B, H, T, E] and
  gates [B, H, T]."""

  keys: jax.Array
  values: jax.Array
  queries: jax.Array
  gates: Gates


class Chunk(NamedTuple):
  """A chunk's tokens, with two values computed for all chunks at once: the slow
  part of the queries' hidden layer, and the rule's decays."""

  tokens: Tokens
  slow_hidden: jax.Array | None
  decays: Tree


def run_memory(
  initial: Weights,
  tokens: Tokens,
  cfg: MemoryConfig,
  *,
  state: chunks.ChunkState | None = None,
  documents: jax.Array | None = None,
  writes: bool = True,
  with_dynamics: bool = False,
) -> MemoryOutput:
  """Reads and writes one memory per head along the sequence.

  Args:
    initial: M_0, hidden [H, F, K] (None: matrix memory), output [H, E, F].
    state: from an earlier call or `chunks.fresh`; None: a new sequence.
    documents: [B, T] document numbers (`memory/chunks.py`).
    writes: if False, nothing is written and o_t = M_0(q_t) (the twin).
    with_dynamics: whether to return the scalars of `dynamics_of`, too.

  Returns:
    o [B, H, T, E], the new state, scalars about the learning.
  """
  if not writes:
    base = chunks.per_sequence(initial, tokens.keys.shape[0], ("heads",))
    trace = architectures.forward(base, tokens.queries, cfg.activation)
    return MemoryOutput(trace.outputs, state, None)
  return chunks.run(
    memory(initial, cfg),
    initial,
    tokens._replace(gates=rules.retained(tokens.gates, cfg)),
    axis=2,
    state=state,
    documents=documents,
    with_dynamics=with_dynamics,
  )


def memory(initial: Weights, cfg: MemoryConfig) -> chunks.Memory:
  """The module's rule as a `chunks.Memory`."""

  def prepare(base, tokens):
    return tokens, slow_hidden(base, tokens.queries)

  def lay_out(xs, live):
    tokens, slow = xs
    decays = rules.subchunk_decays(tokens.gates, live, rules.rule_read(cfg))
    return Chunk(tokens, slow, decays)

  def step(base, start, now, x, places):
    loss = inner_loss(start, base, x.tokens.keys, x.tokens.values, cfg)
    after, read = learn_chunk(start, now, loss, x, cfg)
    return after, read, loss

  def dynamics(base, after, loss, x, places):
    chunk = Learned(after, x.tokens.gates, x.tokens.keys, loss)
    return dynamics_of(initial, base, chunk, cfg, live=places.live)

  return chunks.Memory(
    cfg.chunk_length,
    cfg.remat,
    step,
    prepare=prepare,
    lay_out=lay_out,
    finish=lambda base, tokens, read: read_out(base, tokens.queries, read),
    dynamics=dynamics,
    has_momentum=cfg.momentum != "none",
    acts_on_whole=cfg.retention == "zero",
    kernel=fused.kernel(fused_chunk, cfg, name="memory"),
  )


def slow_hidden(slow: Weights | None, queries: jax.Array) -> jax.Array | None:
  """The part of the queries' hidden layer that comes from M_0."""
  if slow is None or slow.hidden is None:
    return None
  return architectures.apply(queries, slow.hidden)


class InnerLoss(NamedTuple):
  """The inner loss of a chunk's tokens at its first state.

  `features` are the output layer's inputs [B, H, C, F], `errors` dL/dy per
  layer (for setting A see `inner_loss`).
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

  Setting A (`cfg.is_exact`) replaces the output layer's error by the prediction
  without that layer's fast part, minus vhat and clipped.  This is constant in
  the layer's D, and the erase term completes the error token by token.
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
  now: chunks.Fast,
  loss: InnerLoss,
  x: Chunk,
  cfg: MemoryConfig,
  *,
  arithmetic: chunk_lib.Arithmetic = chunk_lib.XLA,
) -> tuple[chunks.Fast, Weights]:
  """One chunk of writes and reads: (state after, what was read).

  Args:
    start: fast weights at the chunk's first state.
    now: fast state before the chunk's tokens x.
    loss: the errors, taken at `start`.

  Returns:
    The state after the tokens, and for `read_out` the hidden features of the
    queries (None: matrix) with the output layer's fast part.
  """
  weight, momentum = now.weight, now.momentum or Weights(None, None)
  rule = rules.LayerRule(x.tokens.gates, x.decays, cfg, cfg.chunk_length)

  def layer(index, inputs, queries, *, exact=False) -> tuple[Tree, Tree]:
    """Writes one layer and reads its fast part at the queries."""
    token_read = cfg.read != "chunk"
    out = rules.write_layer(
      chunk_lib.Tokens(
        inputs, loss.errors[index], queries if token_read else None
      ),
      chunk_lib.State(weight[index], momentum[index]),
      rule,
      exact=exact,
      arithmetic=arithmetic,
    )
    if token_read:
      return out, out.outputs
    return out, architectures.apply(queries, start[index])

  hidden: Tree = None
  features = x.tokens.queries
  if weight.hidden is not None:
    hidden, z = layer(0, x.tokens.keys, features)
    z = z if x.slow_hidden is None else x.slow_hidden + z
    features = architectures.activate(z, cfg.activation)[0]
  output, fast = layer(1, loss.features, features, exact=cfg.is_exact)
  after = chunks.Fast(Weights(hidden and hidden.weight, output.weight))
  if now.momentum is not None:
    momentum = Weights(hidden and hidden.momentum, output.momentum)
    after = dataclasses.replace(after, momentum=momentum)
  return after, Weights(hidden and features, fast)


def fused_chunk(
  initial: Weights,
  now: chunks.Fast,
  tokens: Tokens,
  live: jax.Array | None,
  cfg: MemoryConfig,
) -> tuple[jax.Array, chunks.Fast]:
  """One chunk of one head in a kernel: (o [C, E], state after)."""
  slow = None if cfg.retention == "zero" else initial
  decays = rules.subchunk_decays(
    tokens.gates, live, rules.rule_read(cfg), fused.KERNEL
  )
  loss = inner_loss(now.weight, slow, tokens.keys, tokens.values, cfg)
  x = Chunk(tokens, slow_hidden(slow, tokens.queries), decays)
  after, read = learn_chunk(
    now.weight, now, loss, x, cfg, arithmetic=fused.KERNEL
  )
  return read_out(slow, tokens.queries, read), after


def read_out(
  slow: Weights | None, queries: jax.Array, read: Weights
) -> jax.Array:
  """o = q + h M_0 + h D (mlp) or q M_0 + q D (matrix).

  The slow product is taken for all tokens at once.
  """
  features = queries if read.hidden is None else read.hidden
  outputs = read.output
  if slow is not None:
    outputs = architectures.apply(features, slow.output) + outputs
  return outputs if read.hidden is None else queries + outputs


class Learned(NamedTuple):
  """For `dynamics_of`: the state after a chunk, its gates, keys and loss."""

  after: chunks.Fast
  gates: Gates
  keys: jax.Array
  loss: InnerLoss


def dynamics_of(
  initial: Weights,
  slow: Weights | None,
  chunk: Learned,
  cfg: MemoryConfig,
  *,
  live: jax.Array | None = None,
) -> dict[str, jax.Array]:
  """Scalars about the learning of one chunk.

  Means over tokens, batch and heads of learn_rate (eta), the inner loss at the
  states before and after the chunk (loss_before, loss_after) and clip_rate (the
  share of output errors above error_clip); medians of half_life (tokens) and
  relative_change |D| / |M_0|.  `slow` is None where the rule acts on the whole
  weights; `live` [C] says which places hold a token, None if all do.
  """
  weight, loss = chunk.after.weight, chunk.loss
  final = architectures.whole(slow, weight)
  later = architectures.forward(final, chunk.keys, cfg.activation).outputs
  return {
    "learn_rate": dynamics_lib.mean(chunk.gates.learn_rate, live),
    "half_life": dynamics_lib.half_life(chunk.gates.retention, live),
    "relative_change": dynamics_lib.relative_change(
      initial, weight, slow is None
    ),
    **dynamics_lib.loss_dynamics(
      loss.predictions,
      later,
      loss.targets,
      cfg.loss_factor,
      cfg.error_clip,
      is_dot=cfg.setting == "chunk_dot",
      live=live,
    ),
  }
