"""Memora: a deep memory whose weights stay on the simplex (Miras).

  M(x) = x + LN(W1 act(W2 x)),  W = K softmax(Z) over its input axis of size K
  W_t = K softmax(alpha_t log W_{t-1} - eta_t u_t x_t^T)

This is gradient descent on 1/2 |M(k) - v|^2 with the KL divergence from the
last weights as retention.  On the logits it is the linear rule (P),

  Z_t = alpha_t Z_{t-1} - eta_t u_t x_t^T,

since log W and Z differ by a constant along the input axis, which softmax
cancels.  u_t x_t^T is the gradient for W at the chunk's first state.

Source: Miras 2504.13173.  It does not state the constant in front of the
softmax; here it is K, so that the weights' mean is 1.  LN has neither scale nor
bias.  Z_0 is learned and forgetting returns to it (`retention=start`); `zero`,
the literal form, returns to equal weights, where all hidden units are the same.

Token reads store the weights at every token of a chunk, [B, H, C, E, K].

Legend: B batch, H heads, T tokens, C chunk length, K key dim, F hidden,
E output dim.
"""

import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree

from hope_jax.config import MemoryConfig
from hope_jax.memory import architectures, chunks, deep, norms, rules
from hope_jax.memory import dynamics as dynamics_lib
from hope_jax.memory.architectures import Weights
from hope_jax.memory.chunks import MemoryOutput
from pallas_kernels.linear_rule import one_chunk as chunk_lib


def simplex(logits: Weights) -> Weights:
  """K softmax(Z), K the size of the last axis."""
  return jax.tree.map(
    lambda z: z.shape[-1] * jax.nn.softmax(z, axis=-1), logits
  )


def run_memory(
  initial: Weights,
  tokens: deep.Tokens,
  cfg: MemoryConfig,
  *,
  state: chunks.ChunkState | None = None,
  documents: jax.Array | None = None,
  writes: bool = True,
  with_dynamics: bool = False,
) -> MemoryOutput:
  """As `deep.run_memory`, but `initial` is Z_0."""
  if not writes:
    outputs, _ = read_at(simplex(initial), tokens.queries, cfg)
    return MemoryOutput(outputs, state, None)
  gates = rules.retained(tokens.gates, cfg)
  out = chunks.run(
    memory(initial, cfg),
    initial,
    tokens._replace(gates=gates),
    axis=2,
    state=state,
    documents=documents,
    with_dynamics=with_dynamics,
  )
  if out.dynamics is None:
    return out
  of_gates = {
    "learn_rate": jnp.mean(gates.learn_rate),
    "half_life": dynamics_lib.half_life(gates.retention),
  }
  return out._replace(dynamics=of_gates | out.dynamics)


def memory(initial: Weights, cfg: MemoryConfig) -> chunks.Memory:
  """The module's rule as a `chunks.Memory`."""

  def step(base, start, now, tokens, places):
    weights = simplex(architectures.whole(base, start))
    after, read = learn_chunk(
      weights, (base, now.weight), tokens, cfg, places.live
    )
    return chunks.Fast(after), read, None

  def dynamics(base, after, trace, tokens, places):
    del trace, tokens, places
    change = dynamics_lib.relative_change(initial, after.weight, base is None)
    return {"relative_change": change}

  return chunks.Memory(
    cfg.chunk_length,
    cfg.remat,
    step,
    dynamics=dynamics,
    acts_on_whole=cfg.retention == "zero",
  )


def read_at(
  weights: Weights, x: jax.Array, cfg: MemoryConfig
) -> tuple[jax.Array, architectures.Trace]:
  """M(x), and the trace of its MLP, before LN and the residual."""
  z = architectures.apply(x, weights.hidden)
  features, slope = architectures.activate(z, cfg.activation)
  before_norm = architectures.apply(features, weights.output)
  trace = architectures.Trace(Weights(x, features), slope, before_norm)
  return x + norms.layer_normalize(before_norm), trace


def learn_chunk(
  weights: Weights,
  logits: tuple[Weights | None, Weights],
  tokens: deep.Tokens,
  cfg: MemoryConfig,
  live: jax.Array | None,
) -> tuple[Weights, jax.Array]:
  """One chunk of writes and reads: (logits after it, o [B, H, C, E]).

  Args:
    weights: W at the chunk's first state.
    logits: (base, now) before the tokens; base is Z_0 and now the difference
      from it, or base is None and now is Z.
    live: [C], which places hold a token; None: all do.
  """
  keys, values, queries, gates = tokens
  base, now = logits
  outputs, trace = read_at(weights, keys, cfg)
  error = rules.output_error(outputs, values, cfg)
  error = norms.layer_norm_error(trace.outputs, error)
  assert trace.slope is not None
  hidden = architectures.hidden_error(weights.output, error, trace.slope)
  errors = Weights(rules.clip_norm(hidden, cfg.error_clip), error)
  when = rules.rule_read(cfg)
  decays = chunk_lib.chunk_decays(gates.retention, live=live, read=when)
  mix = decays.before if when == "pre" else decays.after

  def write(index: int) -> tuple[jax.Array, jax.Array | None]:
    """A layer's logits after the chunk, and at every token [B, H, C, E, K]."""
    x, u = trace.inputs[index], errors[index]
    rate, _ = rules.layer_rates(x, gates, cfg, chunk_length=cfg.chunk_length)
    out = chunk_lib.chunk_rule(
      chunk_lib.Tokens(x, u),
      chunk_lib.State(now[index], None),
      decays=decays,
      step_size=rate,
      erase=None,
    )
    if cfg.read == "chunk":
      return out.weight, None
    assert mix is not None
    written = (rate[..., None] * u)[..., None] * x[..., None, :]
    each = mix.start[..., None, None] * now[index][..., None, :, :]
    each -= jnp.einsum("...CD,...DEK->...CEK", mix.pair, written)
    return out.weight, each

  (hidden, hidden_each), (output, output_each) = write(0), write(1)
  after = Weights(hidden, output)
  if cfg.read == "chunk":
    return after, read_at(weights, queries, cfg)[0]
  each: Tree = Weights(hidden_each, output_each)
  if base is not None:
    each = jax.tree.map(lambda z, b: z + b[..., None, :, :], each, base)
  # Every token reads its own weights, as a chunk of one token.
  one_token, _ = read_at(simplex(each), queries[..., None, :], cfg)
  return after, one_token[..., 0, :]
