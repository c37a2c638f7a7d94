"""Continuum memory system, sequential, with the associative signal (eq. 71).

One level is the model's own feed-forward block with fast weights: with
n = RMS(x) and W = W_0 + D,

  y_t = W_down (silu(W_gate n_t) * W_up n_t),   x <- x + y
  after every C tokens:  D <- D - mean_t eta'_t u_t n_t^T   (per matrix)

u is the matrix's error for 1/2 |y_t - value_t|^2 at the chunk's first state,
eta' = eta / (1 + eta |input|^2) its proximal step, eta learned per level.
Reads see only whole chunks, so inside a chunk nothing is sequential.  Deviates
from the paper, which leaves signal and step open: see spec 02, section 4.

A document may begin inside a chunk: its tokens read W_0 until the chunk's end,
and what the chunk leaves behind is what its last document wrote.

Legend: B batch, T tokens, C chunk length, D model, F hidden.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hope_jax.memory import architectures, chunks, deep, rules
from pallas_kernels.scan import CheckpointPolicy


class LevelWeights(NamedTuple):
  """gate, up [..., D, F], down [..., F, D]: slow, or fast with B in front."""

  gate: Any
  up: Any
  down: Any


def zero_state(slow: LevelWeights, batch_size: int) -> dict[str, Any]:
  """D = 0 for every sequence."""
  return {"weight": chunks.zeros(slow, batch_size)}


def run_level(
  slow: LevelWeights,
  inputs: jax.Array,
  values: jax.Array,
  learn_rate: jax.Array,
  *,
  chunk_length: int,
  error_clip: float,
  policy: CheckpointPolicy,
  state: chunks.ChunkState | None = None,
  segments: jax.Array | None = None,
  with_dynamics: bool = False,
) -> tuple[jax.Array, chunks.ChunkState | None, dict[str, jax.Array] | None]:
  """Runs one fast level along the sequence.

  Args:
    slow: W_0, without batch axis.
    inputs: n [B, T, D], the normalised input, which is the key.
    values: [B, T, D], what the block learns to answer.
    learn_rate: eta, a scalar.
    policy: what the backward pass stores (`checkpointed_scan`).
    segments: [B, T] document numbers (`memory/chunks.py`).

  Returns:
    y [B, T, D], the state after, scalars about the learning.
  """
  layout = chunks.plan(inputs.shape[1], chunk_length, state)
  continued = state is not None
  if state is None:
    state = chunks.fresh(zero_state(slow, inputs.shape[0]))
  # The slow products of all tokens at once; the scan adds the fast ones.
  slow_gate = jnp.einsum("BTD,DF->BTF", inputs, slow.gate)
  slow_up = jnp.einsum("BTD,DF->BTF", inputs, slow.up)
  xs = [layout.split(x, axis=1) for x in (inputs, values, slow_gate, slow_up)]
  origin = zero_state(slow, inputs.shape[0])
  docs = chunks.documents(segments, layout, origin)
  masks = docs and (docs.inherits, docs.keeps)

  def step(start, now, xs, _):
    rate = learn_rate, chunk_length
    xs, masks = xs
    after, y = learn_chunk(
      slow, start, now["weight"], xs, rate, error_clip, masks
    )
    dynamics = None
    if with_dynamics:
      dynamics = _dynamics(slow, after, xs, y, error_clip)
    return {"weight": after}, (y, dynamics)

  (y, dynamics), state = chunks.scan_chunks(
    step,
    state,
    (tuple(xs), masks),
    layout,
    chunk_length=chunk_length,
    policy=policy,
    continued=continued,
    docs=docs,
  )
  if dynamics is not None:
    dynamics = deep.summarize(dynamics)
  return layout.merge(y, axis=1), state, dynamics


def learn_chunk(
  slow: LevelWeights,
  start: LevelWeights,
  weight: LevelWeights,
  xs: tuple[jax.Array, ...],
  rate: tuple[jax.Array, int],
  error_clip: float,
  masks: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[LevelWeights, jax.Array]:
  """One chunk: (weights after its tokens, y [B, C, D]).

  Reads and gradients are taken at `start`; `weight` is what earlier tokens of
  the chunk made of it.  `xs`: n, value and the slow products of gate and up; a
  place without a token has n = 0, which writes nothing.
  `rate`: eta and the chunk length that its step is divided by.
  `masks`: inherits and keeps [B, C] of `chunks.Documents`.
  """
  n, value, slow_gate, slow_up = xs

  def fast(equation, x, weight):
    y = jnp.einsum(equation, x, weight)
    return y if masks is None else y * masks[0][..., None]

  gate = slow_gate + fast("BCD,BDF->BCF", n, start.gate)
  up = slow_up + fast("BCD,BDF->BCF", n, start.up)
  activated, slope = architectures.activate(gate, "silu")
  hidden = activated * up
  y = jnp.einsum("BCF,FD->BCD", hidden, slow.down)
  y = y + fast("BCF,BFD->BCD", hidden, start.down)
  error = rules.clip_norm(y - value, error_clip)
  back = jnp.einsum("BCD,FD->BCF", error, slow.down)
  back = back + fast("BCD,BFD->BCF", error, start.down)
  error_gate = rules.clip_norm(back * up * slope, error_clip)
  error_up = rules.clip_norm(back * activated, error_clip)
  learn_rate, chunk_length = rate

  def write(weight, layer_input, layer_error):
    square = jnp.sum(jnp.square(layer_input), axis=-1)
    step = learn_rate / (1.0 + learn_rate * square) / chunk_length
    if masks is not None:
      step = step * masks[1]
    return weight - jnp.einsum(
      "BCD,BCF->BDF", layer_input * step[..., None], layer_error
    )

  if masks is not None:
    weight = chunks.choose(
      masks[1][:, 0], weight, jax.tree.map(jnp.zeros_like, weight)
    )
  after = LevelWeights(
    write(weight.gate, n, error_gate),
    write(weight.up, n, error_up),
    write(weight.down, hidden, error),
  )
  return after, y


def feed_forward(
  slow: LevelWeights, fast: LevelWeights | None, n: jax.Array
) -> jax.Array:
  """The block at one state: n [B, C, D] -> y [B, C, D]."""

  def apply(x, base, difference):
    y = jnp.einsum("BCD,DF->BCF", x, base)
    if difference is None:
      return y
    return y + jnp.einsum("BCD,BDF->BCF", x, difference)

  fast = fast or LevelWeights(None, None, None)
  hidden = jax.nn.silu(apply(n, slow.gate, fast.gate)) * apply(
    n, slow.up, fast.up
  )
  return apply(hidden, slow.down, fast.down)


def _dynamics(slow, after, xs, y, error_clip):
  """Scalars of one chunk, as in `deep.dynamics_of`."""
  n, value, *_ = xs
  later = feed_forward(slow, after, n)
  return {
    "relative_change": deep.relative_change(slow, after),
    **deep.loss_dynamics(y, later, value, 0.5, error_clip),
  }
