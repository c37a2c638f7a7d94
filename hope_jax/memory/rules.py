"""From an inner loss to the terms of the learning rule (P), analytically.

The rule of every layer (docs/equations.md; paper eq. 88 with momentum):

  S_t = beta_t S_{t-1} - eta'_t u_t x_t^T
  W_t = W_{t-1} (alpha_t I - erase_t x_t x_t^T) + S_t

with u the layer's error, x its input.  The proximal step of DGD with decay,
argmin_W 1/2 |W x - u*|^2 + 1/(2 eta) |W - alpha W_t|^2, gives
eta' = eta / (1 + eta |x|^2) and erase = alpha eta' (App. C, but without its
assumption |x| = 1; the literal rule has erase = eta').

Setting A (`token_exact`) takes the errors of the output layer so that the erase
term completes them token by token; its steps are not divided by the chunk
length.  With `negative_eigenvalues` it steps by eta' = eta / max(1, |x|^2), eta
in (0, 2).  Beyond 1 the erase flips the sign of what is stored under x, which
tracking a state such as parity requires; the proximal step never does.

Inside a chunk the rule is linear in (W, S), so a long chunk is solved as a
sequence of subchunks: the result is the same, at the cost of short chunks.

Legend: eta learn_rate, eta' step_size, alpha retention, beta momentum_decay;
P subchunks of a chunk, C tokens.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree

from hope_jax.config import MemoryConfig
from pallas_kernels.common.scan import merge_chunks, split_chunks
from pallas_kernels.linear_rule import one_chunk as chunk_lib

SUBCHUNK_LENGTH = 64  # at most; a solve's cost per token grows with its square


class Gates(NamedTuple):
  """Per token and head [..., C]; momentum_decay is None without momentum."""

  learn_rate: jax.Array
  retention: jax.Array
  momentum_decay: jax.Array | None


def clip_norm(error: jax.Array, bound: float) -> jax.Array:
  """error / max(1, |error| / bound) over the last axis; 0 does not clip."""
  if not bound:
    return error
  square = jnp.sum(jnp.square(error), axis=-1, keepdims=True)
  return error * jnp.minimum(
    1.0, bound * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
  )


def learn_rate(logit: jax.Array, cfg: MemoryConfig) -> jax.Array:
  """eta from its gate: softplus, or in (0, 2) for negative eigenvalues."""
  if cfg.setting == "negative_eigenvalues":
    return 2.0 * jax.nn.sigmoid(logit)
  return jax.nn.softplus(logit)


def learn_rate_logit(rate: float, cfg: MemoryConfig) -> jax.Array:
  """Inverse of `learn_rate`."""
  if cfg.setting == "negative_eigenvalues":
    return jnp.log(rate / (2.0 - rate))
  return jnp.log(jnp.expm1(rate))


def layer_rates(
  x: jax.Array,
  gates: Gates,
  cfg: MemoryConfig,
  *,
  chunk_length: int,
  exact: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
  """(step_size, erase) [..., C] of a layer with input x [..., C, K].

  `exact`: whether the layer learns by setting A.
  """
  rate, square = gates.learn_rate, jnp.sum(jnp.square(x), axis=-1)
  if exact and cfg.setting == "negative_eigenvalues":
    rate = rate / jnp.maximum(1.0, square)
  elif cfg.proximal:
    rate = rate / (1.0 + rate * square)
  if cfg.step_scale == "mean" and not exact:
    rate = rate / chunk_length
  erase = None
  if cfg.delta_rule == "proximal":
    erase = gates.retention * rate
  elif cfg.delta_rule == "literal":
    erase = rate
  if cfg.momentum == "averaged":
    assert gates.momentum_decay is not None
    rate = rate * (1.0 - gates.momentum_decay)
  return rate, erase


def output_error(
  outputs: jax.Array, targets: jax.Array, cfg: MemoryConfig
) -> jax.Array:
  """u of the output layer for loss_factor |M(k) - target|^2, clipped.

  In setting `chunk_dot` the loss is -2 loss_factor <M(k), target>.  The target
  counts as a constant of the inner loss.
  """
  error = -targets if cfg.setting == "chunk_dot" else outputs - targets
  return clip_norm((2.0 * cfg.loss_factor) * error, cfg.error_clip)


def rule_read(cfg: MemoryConfig) -> chunk_lib.Read:
  """Whether the rule's queries see the state before or after their token."""
  return "post" if cfg.read == "token_post" else "pre"


def _subchunks(length: int) -> int:
  """Number of equal subchunks of a chunk; 1 if no fitting number divides it."""
  shortest = -(-length // SUBCHUNK_LENGTH)
  divisors = (p for p in range(shortest, 2 * shortest) if length % p == 0)
  return next(divisors, 1)


def _cut(tree: Tree, count: int, axis: int) -> list[Tree]:
  """Slices a tree into equal parts along an axis, counted from the end."""

  def part(i: int, x: jax.Array) -> jax.Array:
    length = x.shape[axis] // count
    return jax.lax.slice_in_dim(x, i * length, (i + 1) * length, axis=axis)

  return [jax.tree.map(functools.partial(part, i), tree) for i in range(count)]


def subchunk_decays(
  gates: Gates,
  live: jax.Array | None = None,
  read: chunk_lib.Read = "pre",
  arithmetic: chunk_lib.Arithmetic = chunk_lib.XLA,
) -> Tree:
  """Decays of a chunk's subchunks for `write_layer`: [..., P, B, H, C / P ...].

  `gates` [..., B, H, C]; `live` [..., C] says which places hold a token.  In a
  kernel, where C is the first axis, a tuple with the decays of each subchunk.
  """
  retention, momentum_decay = gates.retention, gates.momentum_decay
  count = _subchunks(retention.shape[-1])
  if arithmetic.in_kernel:
    return tuple(
      chunk_lib.chunk_decays(
        *parts[:2], live=parts[2], read=read, arithmetic=arithmetic
      )
      for parts in _cut((retention, momentum_decay, live), count, axis=-1)
    )
  if live is not None:
    live = jnp.broadcast_to(live[..., None, None, :], retention.shape)

  def cut(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x.reshape(*x.shape[:-1], count, -1), -2, -4)

  parts = jax.tree.map(cut, (retention, momentum_decay, live))
  return chunk_lib.chunk_decays(parts[0], parts[1], live=parts[2], read=read)


class LayerRule(NamedTuple):
  """How a layer learns in a chunk: gates [..., C], decays from
  `subchunk_decays`, the config, the number of tokens in a whole chunk."""

  gates: Gates
  decays: Tree
  cfg: MemoryConfig
  chunk_length: int


def write_layer(
  tokens: chunk_lib.Tokens,
  state: chunk_lib.State,
  rule: LayerRule,
  *,
  exact: bool = False,
  arithmetic: chunk_lib.Arithmetic = chunk_lib.XLA,
) -> chunk_lib.LinearRuleOutput:
  """One chunk of (P) on one layer, read at every token if there are queries.

  Args:
    tokens: the layer's inputs [..., C, K], errors [..., C, E] and queries.
    state: W and S, [..., E, K].
    exact: whether the layer learns by setting A.
  """
  cfg, decays = rule.cfg, rule.decays
  rates = layer_rates(
    tokens.x, rule.gates, cfg, chunk_length=rule.chunk_length, exact=exact
  )

  def write(state, subchunk):
    tokens, (step_size, erase), decays = subchunk
    out = chunk_lib.chunk_rule(
      tokens,
      state,
      decays=decays,
      step_size=step_size,
      erase=erase,
      read=rule_read(cfg),
      arithmetic=arithmetic,
    )
    return chunk_lib.State(out.weight, out.momentum), out.outputs

  if arithmetic.in_kernel:
    rows = _cut(tokens, len(decays), axis=-2)
    rates = _cut(rates, len(decays), axis=-1)
    read = []
    for subchunk in zip(rows, rates, decays, strict=True):
      state, outputs = write(state, subchunk)
      read.append(outputs)
    outputs = None
    if tokens.queries is not None:
      outputs = jnp.concatenate(read, axis=-2)
    return chunk_lib.LinearRuleOutput(outputs, *state)
  count, length = decays.before.pair.shape[0], tokens.x.shape[-2]

  def cut(tree, axis):
    part = length // count
    return jax.tree.map(lambda y: split_chunks(y, part, y.ndim + axis), tree)

  subchunks = cut(tokens, -2), cut(rates, -1), decays
  if count == 1:
    state, outputs = write(state, jax.tree.map(lambda y: y[0], subchunks))
    return chunk_lib.LinearRuleOutput(outputs, *state)
  state, outputs = jax.lax.scan(write, state, subchunks)
  if outputs is not None:
    outputs = merge_chunks(outputs, length, tokens.x.ndim - 2)
  return chunk_lib.LinearRuleOutput(outputs, *state)


def retained(gates: Gates, cfg: MemoryConfig) -> Gates:
  """The gates, with alpha = 1 where the memory does not forget."""
  if cfg.retention != "none":
    return gates
  return gates._replace(retention=jnp.ones_like(gates.retention))
