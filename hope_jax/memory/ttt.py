"""TTT-Linear and TTT-MLP: memories with a layer norm, learned in mini-batches.

  f(x) = x + LN(W x + b)                      (linear)
  f(x) = x + LN(W1 gelu(W2 x + b2) + b1)      (MLP)
  inner loss 1/2 |f(k) - v|^2, gradients at the mini-batch's first state
  W_t = W_start + c_t D_t,  D_t = D_{t-1} - eta_t u_t x_t^T,  c_t by position
  o_t = f(q_t; W_t)

c_t = max(0, 1 / t + learned_t), t = 1 .. C, is that of the token that reads;
the next mini-batch starts from W_start + c_C D_C.  u is LN's VJP of the error
LN - (v - k).  D follows the rule (P) with alpha = 1 and no momentum, so a
mini-batch is read by masked products (the paper's dual form).

Between two calls inside a mini-batch `now` holds W_start + D_t, without c_t,
which may be 0.

Source: TTT 2407.04620.

Legend: B batch, H heads, T tokens, C mini-batch, K key dim, F hidden.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree

from hope_jax.config import MemoryConfig
from hope_jax.memory import architectures, chunks, norms
from hope_jax.memory import dynamics as dynamics_lib
from hope_jax.memory.architectures import Weights
from hope_jax.memory.chunks import MemoryOutput


class Layer(NamedTuple):
  """weight [..., F, K], bias [..., F]."""

  weight: Tree
  bias: Tree


class Norm(NamedTuple):
  """LN's scale and bias, [H, K]."""

  scale: jax.Array
  bias: jax.Array

  def __call__(self, z: jax.Array) -> jax.Array:
    """LN(z), z [B, H, C, K]."""
    scale, bias = self.scale[None, :, None], self.bias[None, :, None]
    return norms.layer_normalize(z) * scale + bias

  def error(self, z: jax.Array, target: jax.Array) -> jax.Array:
    """d/dz 1/2 |LN(z) - target|^2."""
    outputs, vjp = jax.vjp(self, z)
    return vjp(outputs - target)[0]


class Tokens(NamedTuple):
  """Inputs of the memory: keys, values, queries [B, H, T, K]; eta [B, H, T];
  c_t, and whether the token is its mini-batch's last (0 or 1), [B, H, T]."""

  keys: jax.Array
  values: jax.Array
  queries: jax.Array
  learn_rate: jax.Array
  factor: jax.Array
  is_last: jax.Array


def position(length: int, state: chunks.ChunkState | None, cfg: MemoryConfig):
  """Positions of the tokens in their mini-batches, [T], from 0."""
  first = 0
  if state is not None and state.position is not None:
    first = state.position
  return (first + jnp.arange(length)) % cfg.chunk_length


def apply(x: jax.Array, layer: Layer) -> jax.Array:
  """x W^T + b, x [B, H, C, K]."""
  return architectures.apply(x, layer.weight) + layer.bias[..., None, :]


def run_memory(
  initial: Weights,
  norm: Norm,
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
    initial: `Layer`s hidden (None: linear) and output, with heads first.
    state: from an earlier call or `chunks.fresh`.
    documents: [B, T] document numbers.
    writes: if False, nothing is written and o_t = f(q_t; W_0).
  """
  if not writes:
    batch_size = tokens.keys.shape[0]
    base = chunks.per_sequence(initial, batch_size, ("heads",))
    outputs = _read(norm, base, None, tokens.queries, None)
    return MemoryOutput(outputs, state, None)
  at_border = state is None or state.position is None
  out = chunks.run(
    memory(initial, norm, cfg, at_border=at_border),
    initial,
    tokens,
    axis=2,
    state=state,
    documents=documents,
    with_dynamics=with_dynamics,
  )
  if out.dynamics is None:
    return out
  of_gates = {"learn_rate": jnp.mean(tokens.learn_rate)}
  return out._replace(dynamics=of_gates | out.dynamics)


def memory(
  initial: Weights, norm: Norm, cfg: MemoryConfig, *, at_border: bool
) -> chunks.Memory:
  """The module's rule as a `chunks.Memory`.

  `at_border`: the tokens begin at a mini-batch's border.
  """

  def step(base, start, now, tokens, places):
    del places
    written = None  # D of this mini-batch before these tokens
    if not at_border:
      written = jax.tree.map(jnp.subtract, now.weight, start)
    weights = architectures.whole(base, start)
    written, outputs = learn_chunk(weights, written, norm, tokens)
    # D's factor afterwards: c_C if the mini-batch ends here, else 1.
    last = jnp.sum(tokens.is_last, axis=-1)
    end = jnp.sum(tokens.is_last * tokens.factor, axis=-1) + 1.0 - last

    def add(weight, change):
      return (
        weight + end.reshape(*end.shape, *(1,) * (change.ndim - 2)) * change
      )

    return chunks.Fast(jax.tree.map(add, start, written)), outputs, None

  def dynamics(base, after, trace, tokens, places):
    del base, trace, tokens, places
    change = dynamics_lib.relative_change(
      matrices(initial), matrices(after.weight)
    )
    return {"relative_change": change}

  return chunks.Memory(cfg.chunk_length, cfg.remat, step, dynamics=dynamics)


def matrices(weights: Weights) -> Weights:
  """The layers without their biases."""
  return Weights(*(layer and layer.weight for layer in weights))


class _Writes(NamedTuple):
  """A mini-batch's writes to a layer: D before them (None: 0), inputs x and
  scaled errors eta u, both [B, H, C, ...], and c_t of the reads [B, H, C]."""

  before: Layer | None
  inputs: jax.Array
  errors: jax.Array
  factor: jax.Array

  def read(self, x: jax.Array) -> jax.Array:
    """c_t (D_t x_t + d_t), with d the bias's part of D."""
    scores = jnp.einsum("...CK,...DK->...CD", x, self.inputs) + 1.0
    read = -jnp.einsum("...CD,...DF->...CF", jnp.tril(scores), self.errors)
    if self.before is not None:
      read += apply(x, self.before)
    return self.factor[..., None] * read

  def after(self) -> Layer:
    """D after these tokens."""
    weight = -jnp.einsum("...CF,...CK->...FK", self.errors, self.inputs)
    change = Layer(weight, -jnp.sum(self.errors, axis=-2))
    if self.before is None:
      return change
    return jax.tree.map(jnp.add, self.before, change)


def learn_chunk(
  weights: Weights, written: Weights | None, norm: Norm, tokens: Tokens
) -> tuple[Weights, jax.Array]:
  """One mini-batch: (D after it, o [B, H, C, K]).

  Args:
    weights: W_start of the mini-batch.
    written: D before the tokens given here; None: 0.
  """
  features, slope = tokens.keys, None
  if weights.hidden is not None:
    features, slope = architectures.activate(
      apply(tokens.keys, weights.hidden), "gelu"
    )
  target = tokens.values - tokens.keys
  error = norm.error(apply(features, weights.output), target)
  scale = tokens.learn_rate[..., None]
  before = written or Weights(None, None)
  hidden = None
  if slope is not None:
    back = architectures.hidden_error(weights.output.weight, error, slope)
    hidden = _Writes(before.hidden, tokens.keys, scale * back, tokens.factor)
  output = _Writes(before.output, features, scale * error, tokens.factor)
  outputs = _read(norm, weights, hidden, tokens.queries, output)
  return Weights(hidden and hidden.after(), output.after()), outputs


def _read(
  norm: Norm,
  weights: Weights,
  hidden: _Writes | None,
  queries: jax.Array,
  output: _Writes | None,
) -> jax.Array:
  """f(q_t; W_start + c_t D_t); without writes f(q_t; W_start)."""
  x = queries
  if weights.hidden is not None:
    z = apply(x, weights.hidden)
    if hidden is not None:
      z += hidden.read(x)
    x = architectures.ACTIVATIONS["gelu"](z)
  z = apply(x, weights.output)
  if output is not None:
    z += output.read(x)
  return queries + norm(z)
