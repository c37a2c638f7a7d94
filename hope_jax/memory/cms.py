"""Continuum memory system with the associative signal (eq. 70-74).

One level is the model's own feed-forward block with fast weights: with
n = RMS(x) and W = W_0 + D,

  y_t = W_down (silu(W_gate n_t) * W_up n_t),   x <- x + y
  after every C tokens:  D <- alpha^C D - mean_t alpha^(C-t) eta'_t u_t k_t^T

u is the matrix's error for 1/2 |y(k_t) - value_t|^2 at the chunk's first state
and eta' = eta / (1 + eta |input|^2) its proximal step.  eta is learned per
level, and so is alpha where a level forgets.  The key k_t is n_t unless others
are given.  Reads see only completed chunks, so inside a chunk nothing is
sequential.  The paper leaves signal and step open; docs/equations.md states the
choices made here.

`run_level` runs one level along the sequence and is called once per level in a
chain (eq. 73) or side by side (eq. 74).  `run_nested` runs levels of which each
restarts from its slower neighbour's state (eq. 72).

A document may begin inside a chunk: its tokens read W_0 until the chunk's end,
and what the chunk leaves behind is what its last document wrote.

Legend: B batch, T tokens, C chunk length, D model, F hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree

from hope_jax.memory import architectures, chunks, norms, products, rules
from hope_jax.memory import dynamics as dynamics_lib
from hope_jax.memory.chunks import MemoryOutput
from pallas_kernels.common.scan import CheckpointPolicy, checkpointed_scan


class LevelWeights(NamedTuple):
  """gate, up [..., D, F], down [..., F, D]: slow, or fast with B in front."""

  gate: Tree
  up: Tree
  down: Tree


class Rule(NamedTuple):
  """How a level learns.

  Attributes:
    learn_rate: eta, a scalar; in `learn_chunk` one per sequence.
    log_retention: log alpha per token, shaped as eta; None: nothing is
      forgotten.
    chunk_length: tokens between updates; the step is divided by it.
    error_clip: largest norm of an error; 0 does not clip.
  """

  learn_rate: jax.Array
  log_retention: jax.Array | None
  chunk_length: int
  error_clip: float


class Inputs(NamedTuple):
  """A block's input n [..., D], and its slow products [..., F] (gate, up)."""

  n: jax.Array
  gate: jax.Array
  up: jax.Array


class Tokens(NamedTuple):
  """A chunk's reads, keys (None: the reads are keys), values [..., D]."""

  reads: Inputs
  keys: Inputs | None
  values: jax.Array


class Trace(NamedTuple):
  """A block's forward pass: hidden = activated * up, y = W_down hidden."""

  hidden: jax.Array
  activated: jax.Array
  slope: jax.Array
  up: jax.Array
  y: jax.Array


def zero_state(slow: LevelWeights, batch_size: int) -> chunks.Fast:
  """D = 0 for every sequence."""
  zeros = jax.tree.map(jnp.zeros_like, slow)
  return chunks.Fast(_per_sequence(zeros, batch_size))


def slow_products(slow: LevelWeights, n: jax.Array) -> Inputs:
  """n [B, T, D], and its products with W_0, which no fast weight changes."""
  return Inputs(n, _slow_product(n, slow.gate), _slow_product(n, slow.up))


def _slow_product(x: jax.Array, slow: jax.Array) -> jax.Array:
  """x W_0, with W_0 shared [D, F] or copied for every sequence [B, D, F]."""
  if slow.ndim == 2:
    return products.matmul(x, slow)
  return jnp.einsum("...TD,...DF->...TF", x, slow)


def _per_sequence(slow: LevelWeights, batch_size: int) -> LevelWeights:
  """Weights for a scan over chunks, see `chunks.per_sequence`."""
  copy = lambda w, *axes: chunks.per_sequence(w, batch_size, axes)
  return LevelWeights(
    copy(slow.gate, None, "mlp"),
    copy(slow.up, None, "mlp"),
    copy(slow.down, "mlp", None),
  )


def _rule_per_sequence(rule: Rule, batch_size: int) -> Rule:
  scalars = rule.learn_rate, rule.log_retention
  scalars = jax.tree.map(jnp.asarray, scalars)
  learn_rate, log_retention = chunks.per_sequence(scalars, batch_size, ())
  return rule._replace(learn_rate=learn_rate, log_retention=log_retention)


def _whole_rows(*arrays: jax.Array | None) -> list[Tree]:
  """[B, T, D] with D not split over devices, or every chunk would gather it."""
  axes = "batch", "length", "act"
  return [
    x if x is None else nn.with_logical_constraint(x, axes) for x in arrays
  ]


def run_level(
  slow: LevelWeights,
  inputs: jax.Array,
  values: jax.Array,
  rule: Rule,
  *,
  policy: CheckpointPolicy,
  keys: jax.Array | None = None,
  state: chunks.ChunkState | None = None,
  documents: jax.Array | None = None,
  with_dynamics: bool = False,
) -> MemoryOutput:
  """Runs one fast level along the sequence.

  Args:
    slow: W_0, without batch axis.
    inputs: n [B, T, D], the normalised input.
    values: [B, T, D], the targets that the block learns.
    policy: what the backward pass stores (`checkpointed_scan`).
    keys: [B, T, D], the inputs for which it learns them; None: `inputs`.
    documents: [B, T] document numbers (`memory/chunks.py`).

  Returns:
    y [B, T, D], the new state, scalars about the learning.
  """
  inputs, keys, values = _whole_rows(inputs, keys, values)
  # The slow products of all tokens at once; the scan adds the fast ones.
  reads = slow_products(slow, inputs)
  written = None if keys is None else slow_products(slow, keys)
  rates = _rule_per_sequence(rule, inputs.shape[0])

  def step(base, start, now, tokens, places):
    after, trace = learn_chunk((base, start, now.weight), tokens, rates, places)
    return chunks.Fast(after), trace.y, start

  def dynamics(base, after, start, tokens, places):
    del base
    states = start, after.weight
    return _dynamics(slow, states, tokens, rule, places.live)

  memory = chunks.Memory(
    rule.chunk_length, policy, step, dynamics=dynamics, spread=_per_sequence
  )
  return chunks.run(
    memory,
    slow,
    Tokens(reads, written, values),
    axis=1,
    state=state,
    documents=documents,
    with_dynamics=with_dynamics,
  )


def learn_chunk(
  weights: tuple[LevelWeights, LevelWeights, LevelWeights],
  tokens: Tokens,
  rule: Rule,
  places: chunks.Places,
) -> tuple[LevelWeights, Trace]:
  """One chunk: (fast weights after its tokens, the trace of its reads).

  `weights` are W_0, D at the chunk's first state (where reads and gradients are
  taken), and D after the chunk's earlier tokens.  A place without a token has
  n = 0, which writes nothing.
  """
  slow, start, weight = weights
  live, inherits, keeps, _ = places
  read = forward(slow, start, tokens.reads, inherits)
  keys, trace = tokens.reads, read
  if tokens.keys is not None:
    keys = tokens.keys
    trace = forward(slow, start, keys, inherits)
  error = rules.clip_norm(trace.y - tokens.values, rule.error_clip)
  errors = _errors((slow, start), trace, error, rule.error_clip, inherits)
  count, later = _ages(tokens.values.shape[1], live)

  def faded(x: jax.Array, age: jax.Array) -> jax.Array:
    if rule.log_retention is None:
      return x
    log_retention = rule.log_retention.reshape(-1, *(1,) * (x.ndim - 1))
    return x * jnp.exp(log_retention * age)

  def write(weight, layer_input, layer_error):
    square = jnp.sum(jnp.square(layer_input), axis=-1)
    learn_rate = rule.learn_rate[:, None]
    rate = learn_rate / (1.0 + learn_rate * square)
    step = faded(rate / rule.chunk_length, later[None])
    if keeps is not None:
      step = step * keeps
    return faded(weight, count) - jnp.einsum(
      "BCD,BCF->BDF", layer_input * step[..., None], layer_error
    )

  if keeps is not None:
    weight = chunks.choose(
      keeps[:, 0], weight, jax.tree.map(jnp.zeros_like, weight)
    )
  layer_inputs = LevelWeights(keys.n, keys.n, trace.hidden)
  return LevelWeights(*map(write, weight, layer_inputs, errors)), read


def forward(
  slow: LevelWeights,
  fast: LevelWeights,
  x: Inputs,
  inherits: jax.Array | None = None,
) -> Trace:
  """The block at one state; places where `inherits` [B, C] is off read W_0."""

  def apply(equation, x, weight):
    y = jnp.einsum(equation, x, weight)
    return y if inherits is None else y * inherits[..., None]

  gate = x.gate + apply("BCD,BDF->BCF", x.n, fast.gate)
  up = x.up + apply("BCD,BDF->BCF", x.n, fast.up)
  activated, slope = architectures.activate(gate, "silu")
  hidden = activated * up
  y = _slow_product(hidden, slow.down)
  y = y + apply("BCF,BFD->BCD", hidden, fast.down)
  return Trace(hidden, activated, slope, up, y)


def _errors(
  weights: tuple[LevelWeights, LevelWeights],
  trace: Trace,
  error: jax.Array,
  bound: float,
  inherits: jax.Array | None,
) -> LevelWeights:
  """Clipped dL/d(output) of each matrix, from the block's output `error`.

  `weights` are W_0 and D.
  """
  slow, fast = weights
  through = jnp.einsum("BCD,BFD->BCF", error, fast.down)
  if inherits is not None:
    through = through * inherits[..., None]
  back = jnp.einsum("...CD,...FD->...CF", error, slow.down) + through
  return LevelWeights(
    rules.clip_norm(back * trace.up * trace.slope, bound),
    rules.clip_norm(back * trace.activated, bound),
    error,
  )


def _ages(length: int, live: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """Number of tokens in a chunk, and number after each of its places [C]."""
  live = jnp.ones(length, jnp.int32) if live is None else live.astype(jnp.int32)
  upto = jnp.cumsum(live)
  return upto[-1], upto[-1] - upto


class NestedLevel(NamedTuple):
  """A level of `run_nested`: its norm's scale [D] and epsilon, its rule, and
  whether it writes (else D stays 0)."""

  scale: jax.Array
  rule: Rule
  writes: bool
  epsilon: float = 1e-6

  def per_sequence(self, batch_size: int) -> "NestedLevel":
    """Its parameters for a scan over chunks, see `chunks.per_sequence`."""
    scale = chunks.per_sequence(self.scale, batch_size, ("act",))
    rule = _rule_per_sequence(self.rule, batch_size)
    return self._replace(scale=scale, rule=rule)

  def normalize(self, x: jax.Array) -> jax.Array:
    """x [B, C, D] -> n [B, C, D], with parameters per sequence."""
    return norms.rms_normalize(x, self.epsilon) * self.scale[:, None]


def run_nested(
  slow: LevelWeights,
  x: jax.Array,
  values: jax.Array,
  levels: Sequence[NestedLevel],
  *,
  policy: CheckpointPolicy,
  keys: jax.Array | None = None,
  state: Sequence[Tree] | None = None,
  documents: jax.Array | None = None,
  with_dynamics: bool = False,
) -> MemoryOutput:
  """Levels in sequence that share W_0, each restarting from the next one.

  When a level's chunk ends, its faster neighbour takes over its D (eq. 72), and
  so on down to the fastest.  All levels advance together by the shortest chunk.
  `x` [B, T, D] is the residual stream; `levels` are ordered fastest first, and
  each chunk length divides the next; other arguments are as in `run_level`.

  Returns:
    x after all levels, a list of their states, and scalars under `cms_0`,
    `cms_1` ...
  """
  lengths = [level.rule.chunk_length for level in levels]
  origin = zero_state(slow, x.shape[0])
  first = None if state is None else state[0]
  layout = chunks.plan(x.shape[1], lengths[0], first)
  states = state or [chunks.fresh(origin) for _ in levels]
  docs = chunks.lay_documents(documents, layout, origin)
  borders = _borders(layout, states, lengths)
  nothing = ((origin.weight,) * 2,) * len(levels)
  base = _per_sequence(slow, x.shape[0])
  copies = [level.per_sequence(x.shape[0]) for level in levels]
  x, keys, values = _whole_rows(x, keys, values)

  def body(carry, inputs):
    (x, values, keys), begins, places, borders = inputs
    if begins is not None:
      carry = chunks.choose(begins, nothing, carry)
    carry = _restart(carry, borders, levels)
    written = None if keys is None else slow_products(base, keys)
    after, dynamics = [], {}
    for i, (level, copy, (start, now)) in enumerate(
      zip(levels, copies, carry, strict=True)
    ):
      tokens = Tokens(slow_products(base, copy.normalize(x)), written, values)
      new, read = learn_chunk((base, start, now), tokens, copy.rule, places)
      x = x + read.y
      new = new if level.writes else now
      if with_dynamics:
        dynamics[f"cms_{i}"] = _dynamics(
          slow, (start, new), tokens, level.rule, places.live
        )
      if places.keeps is not None:
        start = chunks.choose(places.keeps[:, 0], start, origin.weight)
      after.append((start, new))
    return tuple(after), (x, dynamics)

  begins, places = None, chunks.Places(layout.live)
  if docs is not None:
    begins = docs.begins
    places = chunks.Places(layout.live, docs.inherits, docs.keeps)
  xs = jax.tree.map(lambda x: layout.split(x, axis=1), (x, values, keys))
  carry = tuple((s.start, s.now.weight) for s in states)
  carry, (y, dynamics) = checkpointed_scan(
    body, carry, (xs, begins, places, borders), policy=policy
  )
  after = None if state is None else _after(carry, states, layout, levels)
  return MemoryOutput(
    layout.merge(y, axis=1), after, dynamics_lib.summarize(dynamics)
  )


def _after(
  carry: tuple[Tree, ...],
  state: Sequence[Tree],
  layout: chunks.Layout,
  levels: Sequence[NestedLevel],
) -> list[chunks.ChunkState]:
  """The levels' states after all tokens."""
  lengths = [level.rule.chunk_length for level in levels]
  ends: list[Tree] = [s.position + layout.tokens for s in state]
  at_end = [end % c == 0 for end, c in zip(ends, lengths, strict=True)]
  return [
    chunks.ChunkState(chunks.Fast(now), start, (end % c).astype(jnp.int32))
    for (start, now), end, c in zip(
      _restart(carry, at_end, levels), ends, lengths, strict=True
    )
  ]


def _borders(
  layout: chunks.Layout, state: Sequence[Tree], lengths: Sequence[int]
) -> list[jax.Array]:
  """Per level [N]: whether its chunk ends where each shortest chunk begins.

  False at the first one, where the previous call already restarted.
  """
  first = jnp.arange(layout.count) * layout.length
  offset = 0 if layout.offset is None else layout.offset
  past = state[-1].position - offset + first  # of the slowest level's chunk
  inside = (first > 0) & (first < state[0].position + layout.tokens)
  return [inside & (past % length == 0) for length in lengths]


def _restart(
  carry: tuple[Tree, ...],
  borders: Sequence[Tree],
  levels: Sequence[NestedLevel],
) -> tuple[Tree, ...]:
  """(start, now) of every level, after the chunks that end (`borders`)."""
  pairs = list(carry)
  for i in reversed(range(len(levels))):
    start, now = pairs[i]
    if i + 1 < len(levels) and levels[i].writes:
      now = chunks.where(borders[i + 1], pairs[i + 1][1], now)
    pairs[i] = chunks.where(borders[i], now, start), now
  return tuple(pairs)


def feed_forward(slow: LevelWeights, n: jax.Array) -> jax.Array:
  """The block without fast weights: n [B, T, D] -> y [B, T, D]."""
  reads = slow_products(slow, n)
  hidden = jax.nn.silu(reads.gate) * reads.up
  return _slow_product(hidden, slow.down)


def _dynamics(
  slow: LevelWeights,
  states: tuple[LevelWeights, LevelWeights],
  tokens: Tokens,
  rule: Rule,
  live: jax.Array | None,
) -> dict[str, jax.Array]:
  """Scalars about one chunk, as in `deep.dynamics_of`; `states` are D at its
  first token and after it."""
  keys = tokens.reads if tokens.keys is None else tokens.keys
  before, later = (forward(slow, fast, keys).y for fast in states)
  return {
    "learn_rate": rule.learn_rate,
    "relative_change": dynamics_lib.relative_change(slow, states[1]),
    **dynamics_lib.loss_dynamics(
      before, later, tokens.values, 0.5, rule.error_clip, live=live
    ),
  }
