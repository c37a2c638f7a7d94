"""The learning rule over whole chunks, with matrix products (spec 02, sect. 1).

Inside a chunk the rule of `reference.py` is linear in (W, S), so that a chunk
is solved exactly by matrix products and one unit lower triangular system. With
a_t = prod_{r<=t} alpha_r, b_t = prod_{r<=t} beta_r, A_ti = a_t / a_i and
B_ti = b_t / b_i for i <= t, K = A B, m = A b, and prev = one row later:

    R   = rows r_t = W_{t-1} x_t, from
          (I + prevA diag(delta) * X X^T) R
              = prev_a * X W_0^T + prev_m * X S_0^T
                - (prevK diag(eta) * X X^T) U
    Y   = prev_a * Q W_0^T + prev_m * Q S_0^T
          - (prevA diag(delta) * Q X^T) R - (prevK diag(eta) * Q X^T) U
          (read "pre"; without prev it is the read after the token's write)
    W_C = a_C W_0 + m_C S_0 - (diag(A_C delta) R + diag(K_C eta) U)^T X
    S_C = b_C S_0 - (diag(B_C eta) U)^T X

Dimensions: B batch, H heads, T tokens, N chunks, C chunk length, K input width,
E output width. The functions on chunks accept any leading axes, e.g. [N, B, H].
All arithmetic is in float32 (float64 if an input is). The paper's symbols:
alpha = retention, beta = momentum_decay, eta = learn_rate, delta = erase.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import scan as scan_lib
from pallas_kernels.linear_rule import reference

LinearRuleOutput = reference.LinearRuleOutput
Read = reference.Read

_einsum = jnp.einsum
_einsum_exact = functools.partial(jnp.einsum, precision="highest")


# ---------------------------------------------------------------- decays


class ChunkDecays(NamedTuple):
  """All decay factors of one chunk; [..., C, C] or [..., C] or [...].

  Columns i of dead tokens are zero in every pair matrix: they write nothing.
  """

  pair: jax.Array  # A
  pair_prev: jax.Array  # prevA: row t holds A_{t-1,i}; zero rows at resets
  start: jax.Array  # a
  start_prev: jax.Array  # prev_a: row 0 is 1, or 0 if token 0 resets
  # Arrays, or all None without momentum: then K = A and m = 0.
  pair_momentum: Any = None  # K
  pair_momentum_prev: Any = None  # prevK
  start_momentum: Any = None  # m
  start_momentum_prev: Any = None  # prev_m
  momentum_pair_last: Any = None  # last row of B
  momentum_start_last: Any = None  # b_C


def chunk_decays(
  retention: jax.Array,
  momentum_decay: jax.Array | None = None,
  *,
  live: jax.Array | None = None,
  reset: jax.Array | None = None,
) -> ChunkDecays:
  """Computes the decay factors between all tokens of a chunk.

  Args:
    retention: alpha >= 0, [..., C]; exact zeros allowed, also for gradients.
    momentum_decay: beta >= 0, [..., C], or None: no momentum.
    live: bool or 0/1 [..., C]; a dead token leaves W and S as they are.
    reset: bool [..., C]; W and S are zeroed before such a token.
  """
  if live is not None:
    live = live.astype(bool)
    retention = jnp.where(live, retention, 1)
  if reset is not None:
    reset = reset.astype(bool)
  pair, start = _cumulative_products(retention, reset)
  pair = _mask_columns(pair, live)
  decays = ChunkDecays(
    pair=pair,
    pair_prev=_previous_row(pair, reset, axis=-2),
    start=start,
    start_prev=_previous_row(start, reset, axis=-1, first=1),
  )
  if momentum_decay is None:
    return decays
  if live is not None:
    momentum_decay = jnp.where(live, momentum_decay, 1)
  momentum_pair, momentum_start = _cumulative_products(momentum_decay, reset)
  momentum_pair = _mask_columns(momentum_pair, live)
  pair_momentum = _einsum_exact("...ij,...jk->...ik", pair, momentum_pair)
  start_momentum = jnp.sum(pair * momentum_start[..., None, :], axis=-1)
  return decays._replace(
    pair_momentum=pair_momentum,
    pair_momentum_prev=_previous_row(pair_momentum, reset, axis=-2),
    start_momentum=start_momentum,
    start_momentum_prev=_previous_row(start_momentum, reset, axis=-1),
    momentum_pair_last=momentum_pair[..., -1, :],
    momentum_start_last=momentum_start[..., -1],
  )


def decays_for_read(decays: ChunkDecays, read: Read) -> ChunkDecays:
  """Drops the rows `chunk_rule` will not use: halves what a scan must store.

  A read before the write needs only the last rows of A and K.
  """
  if read == "post":
    return decays
  pair, pair_momentum = jax.tree.map(
    lambda rows: rows[..., -1:, :], (decays.pair, decays.pair_momentum)
  )
  return decays._replace(pair=pair, pair_momentum=pair_momentum)


def _cumulative_products(factor, reset):
  """Returns prod_{i<r<=t} f_r as [..., C, C] and prod_{r<=t} f_r as [..., C].

  Exponentials of differences of cumulative log sums, masked before the
  exponential. Zeros would break the logs, so that they are left out and
  counted: a product with n zeros is 0 for n > 0, and its derivative in the
  zero itself is the product of the rest for n = 1, and 0 for n > 1. The sum of
  the zeros carries that derivative.
  """
  factor = factor.astype(jnp.promote_types(jnp.float32, factor.dtype))
  is_zero = jnp.abs(factor) < jnp.finfo(factor.dtype).tiny
  log_sum = jnp.cumsum(jnp.log(jnp.where(is_zero, 1, factor)), axis=-1)
  num_zeros = jnp.cumsum(is_zero, axis=-1)
  zero_sum = jnp.cumsum(jnp.where(is_zero, factor, 0), axis=-1)
  sums = [log_sum, num_zeros, zero_sum]
  if reset is not None:
    sums.append(jnp.cumsum(reset, axis=-1))

  def product(late, early, mask):
    """The product over the tokens after `early` up to `late`."""
    n, zeros = late[1] - early[1], late[2] - early[2]
    if reset is not None:
      mask &= late[3] == early[3]
    log = jnp.where(mask, late[0] - early[0], 0)
    zero_factor = jnp.where(n == 0, 1, jnp.where(n == 1, zeros, 0))
    return jnp.exp(log) * jnp.where(mask, zero_factor, 0)

  tokens = jnp.arange(factor.shape[-1])
  causal = jnp.broadcast_to(
    tokens[:, None] >= tokens[None, :], (*factor.shape, factor.shape[-1])
  )
  pair = product(
    [s[..., :, None] for s in sums], [s[..., None, :] for s in sums], causal
  )
  start = product(
    sums, [jnp.zeros_like(s) for s in sums], jnp.ones(factor.shape, bool)
  )
  return pair, start


def _mask_columns(pair, live):
  return pair if live is None else jnp.where(live[..., None, :], pair, 0)


def _previous_row(rows, reset, *, axis, first=0):
  """Moves rows one token later; a token that resets sees none before it."""
  widths = [(0, 0)] * rows.ndim
  widths[axis] = (1, 0)
  rows = jnp.pad(rows, widths, constant_values=first)
  rows = jax.lax.slice_in_dim(rows, 0, rows.shape[axis] - 1, axis=axis)
  if reset is None:
    return rows
  if axis == -2:
    reset = reset[..., None]
  return jnp.where(reset, 0, rows)


# ----------------------------------------------------------------- solve

_BASE_BLOCK = 16


@jax.custom_jvp
def unit_lower_inverse(strict_lower: jax.Array) -> jax.Array:
  """Inverts I + L for a strictly lower triangular L, [..., C, C].

  Diagonal blocks of 16 by forward substitution, then log2(C / 16) times
  [[P, 0], [-Q L P, Q]] from the inverses P, Q of two neighbours. What L holds
  on and above the diagonal is ignored. Derivative, with the inverse M:
  dM = -M tril(dL, -1) M, hence dL = -tril(M^T dM M^T, -1) in reverse.
  """
  size = strict_lower.shape[-1]
  assert strict_lower.shape[-2] == size, strict_lower.shape
  base = min(_BASE_BLOCK, size)
  num_blocks = 1 << (-(-size // base) - 1).bit_length()
  padding = base * num_blocks - size
  widths = [(0, 0)] * (strict_lower.ndim - 2) + [(0, padding)] * 2
  lower = jnp.pad(strict_lower, widths) if padding else strict_lower
  inverse = _substitute(_diagonal_blocks(lower, base, 0))
  while inverse.shape[-1] < lower.shape[-1]:
    first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
    below = _diagonal_blocks(lower, first.shape[-1], 1)
    corner = _einsum_exact("...ij,...jk->...ik", second, below)
    corner = -_einsum_exact("...ij,...jk->...ik", corner, first)
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    inverse = jnp.concatenate(
      [upper, jnp.concatenate([corner, second], axis=-1)], axis=-2
    )
  return inverse[..., 0, :size, :size]


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals, tangents):
  inverse = unit_lower_inverse(*primals)
  tangent = jnp.tril(tangents[0], -1)
  tangent = _einsum_exact("...ij,...jk->...ik", inverse, tangent)
  return inverse, -_einsum_exact("...ij,...jk->...ik", tangent, inverse)


def _diagonal_blocks(lower, size, below):
  """Takes the diagonal blocks, or every other block below the diagonal."""
  step = size * (1 + below)
  starts = range(0, lower.shape[-1], step)
  rows = size * below
  return jnp.stack(
    [lower[..., s + rows : s + rows + size, s : s + size] for s in starts],
    axis=-3,
  )


def _substitute(lower):
  """Inverts small I + L by eliminating one column of L after the other."""
  lower = jnp.tril(lower, -1)
  inverse = jnp.broadcast_to(
    jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape
  )
  for i in range(lower.shape[-1] - 1):
    inverse -= lower[..., :, i, None] * inverse[..., i, None, :]
  return inverse


# ------------------------------------------------------------- one chunk


def chunk_rule(
  x: jax.Array,
  u: jax.Array,
  *,
  weight: jax.Array,
  momentum: jax.Array | None,
  decays: ChunkDecays,
  learn_rate: jax.Array,
  erase: jax.Array | None,
  queries: jax.Array | None = None,
  read: Read = "pre",
  x_weight: jax.Array | None = None,
  queries_weight: jax.Array | None = None,
  gram: jax.Array | None = None,
) -> LinearRuleOutput:
  """Solves the rule exactly over one chunk (module docstring).

  Dead tokens and resets are in `decays`; the rates of dead tokens may have any
  finite value. Without momentum, `decays` must be made without momentum_decay.
  A leading axis of decays and rates may be 1 where several maps share them.

  Args:
    x: inputs, [..., C, K].
    u: output errors, [..., C, E].
    weight: W at the chunk's start, [..., E, K].
    momentum: S at the chunk's start, or None: a write is not carried on.
    decays: from `chunk_decays`.
    learn_rate: eta, [..., C].
    erase: delta, [..., C], or None: no erase, hence nothing to solve.
    queries: [..., C, K], or None: only the state is computed.
    read: whether token t's query sees the state before or after its write.
    x_weight: x W^T if known, [..., C, E]; used only with erase.
    queries_weight: queries W^T if known, [..., C, E].
    gram: x x^T if known, [..., C, C]; used only with erase.

  Returns:
    outputs [..., C, E] and the state after the chunk, float32 or float64.
  """
  gram_precision = "default" if x.dtype == jnp.bfloat16 else "highest"
  x, u, queries, weight, momentum = jax.tree.map(
    _widen, (x, u, queries, weight, momentum)
  )
  assert (momentum is None) == (decays.pair_momentum is None)
  mix, mix_prev = decays.pair, decays.pair_prev
  if momentum is not None:
    mix, mix_prev = decays.pair_momentum, decays.pair_momentum_prev
  eta_col = learn_rate[..., None, :]
  delta_col: Any = None if erase is None else erase[..., None, :]

  r = outputs = None
  if erase is not None:
    if gram is None:
      gram = _einsum("...CK,...DK->...CD", x, x, precision=gram_precision)
    starts = decays.start_prev, decays.start_momentum_prev
    r = _read_start(x, x_weight, weight, momentum, *starts)
    r -= _einsum("...CD,...DE->...CE", mix_prev * eta_col * gram, u)
    inverse = unit_lower_inverse(decays.pair_prev * delta_col * gram)
    r = _einsum_exact("...CD,...DE->...CE", inverse, r)
  if queries is not None:
    pair, starts = decays.pair, (decays.start, decays.start_momentum)
    if read == "pre":
      pair, mix = decays.pair_prev, mix_prev
      starts = decays.start_prev, decays.start_momentum_prev
    outputs = _read_start(queries, queries_weight, weight, momentum, *starts)
    scores = _einsum("...CK,...DK->...CD", queries, x)
    outputs -= _einsum("...CD,...DE->...CE", mix * eta_col * scores, u)
    if r is not None:
      outputs -= _einsum("...CD,...DE->...CE", pair * delta_col * scores, r)
  state = _state_after(x, u, r, weight, momentum, decays, learn_rate, erase)
  return LinearRuleOutput(outputs, *state)


def _state_after(x, u, r, weight, momentum, decays, learn_rate, erase):
  """W_C and S_C of the module docstring; `r` is R, None without erase."""
  mix = decays.pair if momentum is None else decays.pair_momentum
  writes = (mix[..., -1, :] * learn_rate)[..., None] * u
  if r is not None:
    writes += (decays.pair[..., -1, :] * erase)[..., None] * r
  next_weight = decays.start[..., -1, None, None] * weight
  next_weight -= _einsum("...CE,...CK->...EK", writes, x)
  if momentum is None:
    return next_weight, None
  next_weight += decays.start_momentum[..., -1, None, None] * momentum
  writes = (decays.momentum_pair_last * learn_rate)[..., None] * u
  next_momentum = decays.momentum_start_last[..., None, None] * momentum
  next_momentum -= _einsum("...CE,...CK->...EK", writes, x)
  return next_weight, next_momentum


def _read_start(rows, rows_weight, weight, momentum, start, start_momentum):
  """What rows read of the chunk's first state: a X W_0^T + m X S_0^T."""
  if rows_weight is None:
    rows_weight = _einsum("...CK,...EK->...CE", rows, weight)
  y = start[..., None] * rows_weight
  if momentum is not None:
    rows_momentum = _einsum("...CK,...EK->...CE", rows, momentum)
    y += start_momentum[..., None] * rows_momentum
  return y


def _widen(array):
  return array.astype(jnp.promote_types(jnp.float32, array.dtype))


# --------------------------------------------------------- all the chunks


def linear_rule_chunked(
  x: jax.Array,
  u: jax.Array,
  *,
  weight: jax.Array,
  momentum: jax.Array | None,
  retention: jax.Array,
  momentum_decay: jax.Array | None,
  learn_rate: jax.Array,
  erase: jax.Array | None,
  queries: jax.Array | None = None,
  read: Read = "pre",
  reset: jax.Array | None = None,
  chunk_length: int,
  checkpoint: scan_lib.CheckpointPolicy = "sqrt",
) -> LinearRuleOutput:
  """`reference.linear_rule_reference` by chunks of `chunk_length` tokens.

  The decays are computed for all chunks at once; a scan then carries the state
  over the chunks. `checkpoint` says what the backward pass recomputes
  (`scan.checkpointed_scan`).
  """
  num_tokens = x.shape[2]
  chunk_length = min(chunk_length, num_tokens)
  live = None
  if num_tokens % chunk_length:
    live = jnp.ones(retention.shape, bool)
  split = functools.partial(
    jax.tree.map, lambda leaf: scan_lib.split_chunks(leaf, chunk_length)
  )
  decays = chunk_decays(
    split(retention),
    split(momentum_decay),
    live=split(live),
    reset=split(reset),
  )
  decays = decays_for_read(decays, read)

  def body(state, chunk):
    x, u, queries, decays, learn_rate, erase = chunk
    weight, momentum = state
    out = chunk_rule(
      x,
      u,
      weight=weight,
      momentum=momentum,
      decays=decays,
      learn_rate=learn_rate,
      erase=erase,
      queries=queries,
      read=read,
    )
    return (out.weight, out.momentum), out.outputs

  chunks = (*split((x, u, queries)), decays, *split((learn_rate, erase)))
  dtype = reference.state_dtype(weight, chunks)
  state = jax.tree.map(lambda leaf: leaf.astype(dtype), (weight, momentum))
  (weight, momentum), outputs = scan_lib.checkpointed_scan(
    body, state, chunks, policy=checkpoint
  )
  if outputs is not None:
    outputs = scan_lib.merge_chunks(outputs, num_tokens).astype(u.dtype)
  return LinearRuleOutput(outputs, weight, momentum)
