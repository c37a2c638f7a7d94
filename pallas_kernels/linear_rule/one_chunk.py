"""The learning rule over one chunk, with matrix products.

Inside a chunk the rule of `reference.py` is linear in (W, S), so that a chunk
is solved exactly by matrix products and one unit lower triangular system
(docs/equations.md, "The same by chunks"). With a_t = prod_{r<=t} alpha_r,
b_t = prod_{r<=t} beta_r, A_ti = a_t / a_i and B_ti = b_t / b_i for i <= t,
K = A B, m = A b, and prev = one row later:

    R   = rows r_t = W_{t-1} x_t, from
          (I + prevA diag(delta) * X X^T) R
              = prev_a * X W_0^T + prev_m * X S_0^T
                - (prevK * X X^T) diag(eta') U
    Y   = prev_a * Q W_0^T + prev_m * Q S_0^T
          - (prevA * Q X^T) diag(delta) R - (prevK * Q X^T) diag(eta') U
          (read "pre"; without prev it is the read after the token's write)
    W_C = a_C W_0 + m_C S_0 - (diag(A_C delta) R + diag(K_C eta') U)^T X
    S_C = b_C S_0 - (diag(B_C eta') U)^T X

Every implementation runs these functions: `xla.py` with leading axes, e.g.
[B, H], the Pallas kernels with none.

Dimensions: C chunk length, K input width, E output width. All arithmetic is in
float32 (float64 if an input is). The paper's symbols: alpha = retention,
beta = momentum_decay, eta' = step_size, delta = erase.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_rule.reference import (
  LinearRuleOutput,
  Read,
  State,
  Tokens,
)

_einsum = jnp.einsum


class Arithmetic(NamedTuple):
  """How products that must not lose digits are computed.

  precision: of matrix products, as in `jnp.einsum`.
  in_kernel: uses only products, masks and sums of whole matrices.
  """

  precision: Any = "highest"
  in_kernel: bool = False

  def matmul(self, a: jax.Array, b: jax.Array) -> jax.Array:
    return _einsum("...ij,...jk->...ik", a, b, precision=self.precision)

  def matvec(self, a: jax.Array, b: jax.Array) -> jax.Array:
    if self.in_kernel:
      return jnp.sum(a * b[..., None, :], axis=-1)
    return _einsum("...ij,...j->...i", a, b, precision=self.precision)

  def vecmat(self, a: jax.Array, b: jax.Array) -> jax.Array:
    if self.in_kernel:
      return jnp.sum(a[..., :, None] * b, axis=-2)
    return _einsum("...j,...jk->...k", a, b, precision=self.precision)


XLA = Arithmetic()


# ---------------------------------------------------------------- decays


class Mix(NamedTuple):
  """How a state sees the writes of the chunk and its first state.

  For the states at all tokens: pair [..., C, C], start [..., C]; for one state:
  pair [..., C], start [..., 1]. Columns of dead tokens (padding) are zero in
  `pair`: they write nothing.
  """

  pair: jax.Array  # A
  start: jax.Array  # a
  pair_momentum: jax.Array | None = None  # K; without momentum A
  start_momentum: jax.Array | None = None  # m; without momentum 0

  @property
  def writes(self) -> jax.Array:
    """K, which is A without momentum."""
    return self.pair if self.pair_momentum is None else self.pair_momentum


class ChunkDecays(NamedTuple):
  """All decay factors of one chunk."""

  before: Mix  # of the states before each token's write: prevA, prev_a ...
  after: Mix | None  # of those after it; None unless they are read
  end: Mix  # of the chunk's last state
  momentum_pair_end: jax.Array | None = None  # last row of B, [..., C]
  momentum_start_end: jax.Array | None = None  # b_C, [..., 1]


def chunk_decays(
  retention: jax.Array,
  momentum_decay: jax.Array | None = None,
  *,
  live: jax.Array | None = None,
  reset: jax.Array | None = None,
  read: Read = "pre",
  arithmetic: Arithmetic = XLA,
) -> ChunkDecays:
  """Computes the decay factors between all tokens of a chunk.

  Args:
    retention: alpha, [..., C]; any values, also exact zeros and in gradients.
    momentum_decay: beta, [..., C], likewise, or None: no momentum.
    live: bool or 0/1 [..., C]; a dead token leaves W and S unchanged.
    reset: bool or 0/1 [..., C]; where set, W and S are zeroed before the token.
    read: which states the queries see; "pre" leaves `after` out.
  """
  if live is not None:
    live = live.astype(bool)
    retention = jnp.where(live, retention, 1)
    if momentum_decay is not None:
      momentum_decay = jnp.where(live, momentum_decay, 1)
  live_row = None if live is None else live[..., None, :]
  kept = _Products(retention, reset, arithmetic)
  moved = None
  if momentum_decay is not None:
    moved = _Products(momentum_decay, reset, arithmetic)
    moved_pair = _keep(moved.pair(), live_row)

  def rows(pair: jax.Array, start: jax.Array) -> Mix:
    """The `Mix` of the states at all tokens."""
    pair = _keep(pair, live_row)
    if moved is None:
      return Mix(pair, start)
    return Mix(
      pair,
      start,
      arithmetic.matmul(pair, moved_pair),
      arithmetic.matvec(pair, moved.start()),
    )

  before = rows(kept.pair_before(), kept.start_before())
  after = rows(kept.pair(), kept.start()) if read == "post" else None
  pair, start = _keep(kept.pair_end(), live), kept.start_end()
  if moved is None:
    return ChunkDecays(before, after, Mix(pair, start))
  end = Mix(
    pair,
    start,
    arithmetic.vecmat(pair, moved_pair),
    jnp.sum(pair * moved.start(), axis=-1, keepdims=True),
  )
  pair_end = _keep(moved.pair_end(), live)
  return ChunkDecays(before, after, end, pair_end, moved.start_end())


def live_tokens(index: jax.Array, length: int, num_tokens: int) -> jax.Array:
  """Which positions of chunk `index` hold one of `num_tokens` tokens, [C]."""
  place = jax.lax.broadcasted_iota(jnp.int32, (length,), 0)
  return index * length + place < num_tokens


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def products_between(
  factor: jax.Array, arithmetic: Arithmetic = XLA
) -> jax.Array:
  """P_ti = prod_{i<r<t} f_r for i < t, else 0: [..., C] -> [..., C, C].

  Blocks of 1, 2, 4 ... tokens are joined in pairs: the product between tokens
  of two neighbours is that to the end of the one times that from the start of
  the other.  The derivative is dP = P diag(df) P.  Values and derivatives are
  products of the factors themselves, so they stay accurate down to exact zeros,
  unlike quotients or differences of sums of logarithms.
  """
  join = _between_by_masks if arithmetic.in_kernel else _between_by_blocks
  return join(factor)


@products_between.defjvp
def _products_between_jvp(arithmetic, primals, tangents):
  products = products_between(primals[0], arithmetic)
  # Scaled by rows: the gradient to df sums along rows, which is faster.
  tangent = tangents[0][..., None] * products
  return products, arithmetic.matmul(products, tangent)


def _between_by_masks(factor: jax.Array) -> jax.Array:
  """Joins all pairs of blocks of one size at once."""
  size = factor.shape[-1]
  row, column = _places((*factor.shape, size))
  place = jax.lax.broadcasted_iota(jnp.int32, factor.shape, factor.ndim - 1)
  # The products over a token's block before and after the token.
  before = after = jnp.ones_like(factor)
  products = jnp.zeros_like(factor[..., :, None] * factor[..., None, :])
  for level in range((size - 1).bit_length()):
    is_pair = (row > column) & (row >> level ^ column >> level == 1)
    pair = before[..., :, None] * after[..., None, :]
    products = jnp.where(is_pair, pair, products)
    # The product over the other block of the pair; 1 if there is none.
    total = (before * factor * after)[..., None, :]
    first = (row >> level ^ 1) << level
    other = jnp.where(
      first < size, jnp.where(column == first, total, 0), row == column
    )
    other = jnp.sum(other, axis=-1)
    is_second = (place >> level) % 2 == 1
    before = jnp.where(is_second, before * other, before)
    after = jnp.where(is_second, after, after * other)
  return products


def _between_by_blocks(factor: jax.Array) -> jax.Array:
  """Joins pairs of blocks along an axis of blocks, padded with factors of 1."""
  size = factor.shape[-1]
  padding = (1 << (size - 1).bit_length()) - size
  widths = [(0, 0)] * (factor.ndim - 1) + [(0, padding)]
  total = jnp.pad(factor, widths, constant_values=1)[..., None]
  before = after = jnp.ones_like(total)
  products = jnp.zeros_like(total[..., None])
  while total.shape[-2] > 1:
    (f, g), (before, before_g), (after_f, after) = (
      (x[..., 0::2, :], x[..., 1::2, :]) for x in (total, before, after)
    )
    first, second = products[..., 0::2, :, :], products[..., 1::2, :, :]
    corner = before_g[..., :, None] * after_f[..., None, :]
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    products = jnp.concatenate(
      [upper, jnp.concatenate([corner, second], axis=-1)], axis=-2
    )
    before = jnp.concatenate([before, f * before_g], axis=-1)
    after = jnp.concatenate([after_f * g, after], axis=-1)
    total = f * g
  return products[..., 0, :size, :size]


class _Products:
  """Products of a factor over the tokens between two; 0 across a reset."""

  def __init__(
    self, factor: jax.Array, reset: jax.Array | None, arithmetic: Arithmetic
  ):
    self.factor = factor = _widen(factor)
    self.in_kernel, self.size = arithmetic.in_kernel, factor.shape[-1]
    axis = factor.ndim - 1
    self.place = jax.lax.broadcasted_iota(jnp.int32, factor.shape, axis)
    row, column = _places((*factor.shape, self.size))
    self.is_same, self.not_earlier = row == column, row >= column
    self.between = products_between(factor, arithmetic)
    if self.in_kernel:
      before = jnp.sum(jnp.where(column == 0, self.between, 0), -1)
      after = jnp.sum(jnp.where(row == self.size - 1, self.between, 0), -2)
    else:
      before, after = self.between[..., 0], self.between[..., -1, :]
    first, last = self._one(factor, 0), self._one(factor, self.size - 1)
    # The products over the chunk before and after each token.
    self.before = jnp.where(self.place == 0, 1, first * before)
    self.after = jnp.where(self.place == self.size - 1, 1, last * after)
    self.resets = self.all_resets = None
    if reset is not None:
      self.resets = self._up_to(reset.astype(factor.dtype))
      self.all_resets = self._one(self.resets, self.size - 1)

  def _one(self, x: jax.Array, index: int) -> jax.Array:
    """The entry of one token, [..., 1]."""
    if not self.in_kernel:
      return x[..., index : index + 1]
    return jnp.sum(jnp.where(self.place == index, x, 0), -1, keepdims=True)

  def _up_to(self, x: jax.Array) -> jax.Array:
    if not self.in_kernel:
      return jnp.cumsum(x, axis=-1)
    return jnp.sum(jnp.where(self.not_earlier, x[..., None, :], 0), -1)

  def _pair(self, products: jax.Array) -> jax.Array:
    if self.resets is None:
      return products
    is_same = self.resets[..., :, None] == self.resets[..., None, :]
    return jnp.where(is_same, products, 0)

  def _start(self, products: jax.Array) -> jax.Array:
    if self.resets is None:
      return products
    return jnp.where(self.resets == 0, products, 0)

  def pair(self) -> jax.Array:
    """prod_{i<r<=t} f_r for i <= t, [..., C, C]."""
    later = self.factor[..., :, None] * self.between
    return self._pair(jnp.where(self.is_same, 1, later))

  def pair_before(self) -> jax.Array:
    """prod_{i<r<t} f_r for i < t."""
    return self._pair(self.between)

  def pair_end(self) -> jax.Array:
    """prod_{i<r} f_r, [..., C]."""
    if self.resets is None:
      return self.after
    return jnp.where(self.resets == self.all_resets, self.after, 0)

  def start(self) -> jax.Array:
    """prod_{r<=t} f_r, [..., C]."""
    return self._start(self.before * self.factor)

  def start_before(self) -> jax.Array:
    """prod_{r<t} f_r."""
    return self._start(self.before)

  def start_end(self) -> jax.Array:
    """prod_r f_r, [..., 1]."""
    return self._one(self.start(), self.size - 1)


def _keep(pair: jax.Array, live: jax.Array | None) -> jax.Array:
  return pair if live is None else jnp.where(live, pair, 0)


# ----------------------------------------------------------------- solve


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def unit_lower_inverse(
  strict_lower: jax.Array, arithmetic: Arithmetic = XLA
) -> jax.Array:
  """Inverts I + L for a strictly lower triangular L, [..., C, C].

  By halves: with P, Q the inverses of two diagonal blocks and L' the block of L
  below the first, the inverse of both is [[P, 0], [-Q L' P, Q]]. Entries of L
  on and above the diagonal are ignored. Derivative, with the inverse M:
  dM = -M tril(dL, -1) M, hence dL = -tril(M^T dM M^T, -1) in reverse.
  """
  assert strict_lower.shape[-2] == strict_lower.shape[-1], strict_lower.shape
  invert = _inverse_by_masks if arithmetic.in_kernel else _inverse_by_blocks
  return invert(strict_lower, arithmetic)


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(arithmetic, primals, tangents):
  inverse = unit_lower_inverse(primals[0], arithmetic)
  row, column = _places(inverse.shape)
  tangent = jnp.where(row > column, tangents[0], 0)
  return inverse, -arithmetic.matmul(
    arithmetic.matmul(inverse, tangent), inverse
  )


def _places(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  """Row and column numbers of [..., C, C]."""
  row, column = (
    jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - axis)
    for axis in (2, 1)
  )
  return row, column


def _inverse_by_masks(
  strict_lower: jax.Array, arithmetic: Arithmetic
) -> jax.Array:
  """Joins all blocks of one size at once: M - M L_off M, with M the inverses of
  the diagonal blocks and L_off the entries of L between two neighbours."""
  row, column = _places(strict_lower.shape)
  inverse = (row == column).astype(strict_lower.dtype)
  for level in range((strict_lower.shape[-1] - 1).bit_length()):
    is_pair = row >> (level + 1) == column >> (level + 1)
    is_off = is_pair & (row >> level > column >> level)
    off = jnp.where(is_off, strict_lower, 0)
    if level:  # at level 0 the inverse is 1
      off = arithmetic.matmul(arithmetic.matmul(inverse, off), inverse)
    inverse -= off
  return inverse


_BASE_BLOCK = 16


def _inverse_by_blocks(
  strict_lower: jax.Array, arithmetic: Arithmetic
) -> jax.Array:
  """Diagonal blocks of 16 by forward substitution, then by halves."""
  size = strict_lower.shape[-1]
  base = min(_BASE_BLOCK, size)
  num_blocks = 1 << (-(-size // base) - 1).bit_length()
  padding = base * num_blocks - size
  widths = [(0, 0)] * (strict_lower.ndim - 2) + [(0, padding)] * 2
  lower = jnp.pad(strict_lower, widths) if padding else strict_lower
  inverse = _substitute(_diagonal_blocks(lower, base, 0))
  while inverse.shape[-1] < lower.shape[-1]:
    first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
    below = _diagonal_blocks(lower, first.shape[-1], 1)
    corner = -arithmetic.matmul(arithmetic.matmul(second, below), first)
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    inverse = jnp.concatenate(
      [upper, jnp.concatenate([corner, second], axis=-1)], axis=-2
    )
  return inverse[..., 0, :size, :size]


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
  tokens: Tokens,
  state: State,
  *,
  decays: ChunkDecays,
  step_size: jax.Array,
  erase: jax.Array | None,
  read: Read = "pre",
  arithmetic: Arithmetic = XLA,
) -> LinearRuleOutput:
  """Solves the rule exactly over one chunk (module docstring).

  Dead tokens and resets are in `decays`; the rates of dead tokens may have any
  finite value. Without momentum, `decays` must be made without momentum_decay.
  A leading axis of decays and rates may be 1 where several maps share them.

  Args:
    tokens: of the chunk, [..., C, ...]; without queries only the state is
      computed.
    state: at the chunk's start.
    decays: from `chunk_decays`.
    step_size: eta', [..., C].
    erase: delta, [..., C], or None: no erase, hence nothing to solve.
    read: whether token t's query sees the state before or after its write.
    arithmetic: how the triangular system is solved.

  Returns:
    outputs [..., C, E] and the state after the chunk, float32 or float64.
  """
  gram_precision = "default" if tokens.x.dtype == jnp.bfloat16 else "highest"
  (x, u, queries), state = jax.tree.map(_widen, (tokens, state))
  before = decays.before
  assert (state.momentum is None) == (before.pair_momentum is None)
  rated_u = step_size[..., None] * u  # diag(eta') U

  r = rated_r = outputs = None  # R and diag(delta) R
  if erase is not None:
    gram = _einsum("...CK,...DK->...CD", x, x, precision=gram_precision)
    r = _read_start(x, state, before)
    r -= _einsum("...CD,...DE->...CE", before.writes * gram, rated_u)
    lower = before.pair * gram * erase[..., None, :]
    r = arithmetic.matmul(unit_lower_inverse(lower, arithmetic), r)
    rated_r = erase[..., None] * r
  if queries is not None:
    mix = before if read == "pre" else decays.after
    assert mix is not None, "decays were made for another read"
    outputs = _read_start(queries, state, mix)
    scores = _einsum("...CK,...DK->...CD", queries, x)
    seen = mix.writes * scores
    outputs -= _einsum("...CD,...DE->...CE", seen, rated_u)
    if rated_r is not None:
      erased = mix.pair * scores
      outputs -= _einsum("...CD,...DE->...CE", erased, rated_r)
  after = _state_after(x, (rated_u, rated_r), state, decays)
  return LinearRuleOutput(outputs, *after)


def _state_after(
  x: jax.Array,
  rated: tuple[jax.Array, jax.Array | None],
  state: State,
  decays: ChunkDecays,
) -> State:
  """W_C and S_C of the module docstring; `rated`: diag(eta') U and diag(delta)
  R, which is None without erase."""
  (rated_u, rated_r), (weight, momentum), end = rated, state, decays.end
  writes = end.writes[..., None] * rated_u
  if rated_r is not None:
    writes += end.pair[..., None] * rated_r
  next_weight = end.start[..., None] * weight
  next_weight -= _einsum("...CE,...CK->...EK", writes, x)
  if momentum is None:
    return State(next_weight, None)
  from_start, pair_end = decays.momentum_start_end, decays.momentum_pair_end
  assert end.start_momentum is not None
  assert from_start is not None and pair_end is not None
  next_weight += end.start_momentum[..., None] * momentum
  writes = pair_end[..., None] * rated_u
  next_momentum = from_start[..., None] * momentum
  next_momentum -= _einsum("...CE,...CK->...EK", writes, x)
  return State(next_weight, next_momentum)


def _read_start(rows: jax.Array, state: State, mix: Mix) -> jax.Array:
  """What `rows` read from the chunk's first state: a X W_0^T + m X S_0^T."""
  weight, momentum = state
  y = mix.start[..., None] * _einsum("...CK,...EK->...CE", rows, weight)
  if momentum is not None:
    assert mix.start_momentum is not None
    rows_momentum = _einsum("...CK,...EK->...CE", rows, momentum)
    y += mix.start_momentum[..., None] * rows_momentum
  return y


def _widen(array: jax.Array) -> jax.Array:
  return array.astype(jnp.promote_types(jnp.float32, array.dtype))
