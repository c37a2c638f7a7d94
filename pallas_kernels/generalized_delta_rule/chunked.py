"""The generalized delta rule by chunks: matrix products, one scan over chunks.

With L_t the sum of log w over the chunk's tokens up to t, u_t = S_{t-1} p_t
what the erase reads, and for i <= t

  S_t = S_0 diag(e^{L_t}) + sum_i (u_i b_i^T + v_i k_i^T) diag(e^{L_t - L_i}),

so that, strictly lower triangular in t and i,

  (I - <p_t, b_i>) U = <p_t, S_0> + <p_t, k_i> V,
      <p_t, x_i> = sum_c p_tc x_ic e^{L_{t-1,c} - L_{i,c}}

is one unit lower triangular system per chunk; outputs and the chunk's last
state are products again.  Exact for any chunk length.

The decays differ by channel, so that the products <., .> take them apart into
e^{L_t} and e^{-L_i}.  A channel keeps at least e^{-f} of itself per token, with
f = e^{-1/2} in RWKV-7 (0.545): over C tokens -f C <= L <= 0.  Both factors are
measured from the middle of that range and stay within e^{f C / 2}, and what
they make above the diagonal, which is masked, within e^{f C}: float32 holds
that to f C = `LARGEST_EXPONENT`.  Every factor has a relative error of f C
6e-8, which no subtraction makes larger.  (The middle of the decays that are
there would be nearer, but would let a later token into an earlier one's
rounding.)

Dimensions: B batch, H heads, T tokens, N chunks, C chunk length, K key dim, E
value dim.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.common import scan as scan_lib
from pallas_kernels.generalized_delta_rule.reference import DeltaRuleOutput
from pallas_kernels.linear_rule.one_chunk import unit_lower_inverse

MAX_CHUNK_LENGTH = 128
FASTEST_DECAY = math.exp(-0.5)  # of RWKV-7, -log w
LARGEST_EXPONENT = FASTEST_DECAY * MAX_CHUNK_LENGTH

_einsum = functools.partial(jnp.einsum, precision="highest")


def generalized_delta_rule(
  keys: jax.Array,
  values: jax.Array,
  *,
  queries: jax.Array,
  log_decay: jax.Array,
  erase_read: jax.Array,
  erase_write: jax.Array,
  weight: jax.Array,
  reset: jax.Array | None = None,
  chunk_length: int = 16,
  fastest_decay: float = FASTEST_DECAY,
  checkpoint: scan_lib.CheckpointPolicy = "sqrt",
) -> DeltaRuleOutput:
  """S_t = S_{t-1} (diag(w_t) + p_t b_t^T) + v_t k_t^T; reads o_t = S_t r_t.

  Source: RWKV-7, 2503.14456.  Everything is float32 (float64 if all is).

  Args:
    keys: k, [B, H, T, K].
    values: v, [B, H, T, E].
    queries: r, [B, H, T, K].
    log_decay: log w in -fastest_decay .. 0, [B, H, T, K]; what is outside of it
      counts as the nearer bound, and has no gradient.
    erase_read: p, [B, H, T, K].
    erase_write: b, [B, H, T, K].
    weight: S before the first token, [B, H, E, K].
    reset: bool [B, H, T]: S is zeroed before such a token.
    chunk_length: tokens per chunk; the result does not depend on it.
    fastest_decay: bound of -log_decay; a larger one needs shorter chunks.  With
      17 (4 tokens) what it leaves of a state is less than float32 resolves.
    checkpoint: what the backward pass recomputes (`scan.checkpointed_scan`).

  Raises:
    ValueError: for a chunk_length above `MAX_CHUNK_LENGTH`, or one that is too
      long for fastest_decay.
  """
  longest = MAX_CHUNK_LENGTH
  if fastest_decay > FASTEST_DECAY:
    longest = int(LARGEST_EXPONENT / fastest_decay)
  if not 0 < chunk_length <= longest:
    raise ValueError(
      f"{chunk_length=} is not in 1 .. {longest} for {fastest_decay=:.3g}"
    )
  log_decay = jnp.where(log_decay < -fastest_decay, -fastest_decay, log_decay)
  log_decay = jnp.where(log_decay > 0, 0, log_decay)
  num_tokens = keys.shape[2]
  chunk_length = min(chunk_length, num_tokens)
  # A last chunk is filled up with tokens that neither decay, erase nor write.
  tokens = keys, values, queries, log_decay, erase_read, erase_write, reset
  chunks = jax.tree.map(
    lambda x: scan_lib.split_chunks(x, chunk_length), tokens
  )
  weight, outputs = scan_lib.checkpointed_scan(
    functools.partial(_chunk, fastest_decay=fastest_decay),
    weight,
    chunks,
    policy=checkpoint,
  )
  return DeltaRuleOutput(scan_lib.merge_chunks(outputs, num_tokens), weight)


def _chunk(weight, chunk, *, fastest_decay):
  """One chunk of the module's docstring: (S_C, O)."""
  k, v, r, log_w, p, b, reset = chunk
  log_w = jnp.cumsum(log_w, axis=-2)
  before = jnp.pad(
    log_w[..., :-1, :], [(0, 0)] * (log_w.ndim - 2) + [(1, 0), (0, 0)]
  )
  end = log_w[..., -1:, :]
  middle = -0.5 * fastest_decay * k.shape[-2]
  away = jnp.exp(middle - log_w)
  earlier, upto, sees_start, sees_end = _masks(reset, k.shape[:-1])

  def products(left, decay, mask):
    """<left_t, b_i> and <left_t, k_i>, zero where `mask` is."""
    left = left * jnp.exp(decay - middle)
    pair = lambda right: jnp.where(
      mask, _einsum("...CK,...DK->...CD", left, right * away), 0
    )
    return pair(b), pair(k)

  def read_start(left, decay):
    """<left_t, S_0>."""
    left = jnp.where(sees_start[..., None], left * jnp.exp(decay), 0)
    return _einsum("...CK,...EK->...CE", left, weight)

  apply = functools.partial(_einsum, "...CD,...DE->...CE")
  erased, written = products(p, before, earlier)
  u = read_start(p, before) + apply(written, v)
  u = apply(unit_lower_inverse(-erased), u)
  erased, written = products(r, log_w, upto)
  outputs = read_start(r, log_w) + apply(erased, u) + apply(written, v)

  left = jnp.where(sees_end[..., None], jnp.exp(end - log_w), 0)
  add = functools.partial(_einsum, "...CE,...CK->...EK")
  kept = jnp.where(sees_start[..., -1:, None], jnp.exp(end), 0)
  return weight * kept + add(u, b * left) + add(v, k * left), outputs


def _masks(reset, shape):
  """Which token sees the writes i < t, i <= t and S_0; whose the end sees.

  A token sees what has as many resets before it.
  """
  count = jnp.zeros(shape, jnp.int32)
  if reset is not None:
    count = jnp.cumsum(reset.astype(jnp.int32), axis=-1)
  is_same = count[..., :, None] == count[..., None, :]
  place = jnp.arange(shape[-1])
  order = place[:, None] - place[None]
  expand = (None,) * (count.ndim - 1)
  earlier, upto = (order > 0)[expand], (order >= 0)[expand]
  return (
    is_same & earlier,
    is_same & upto,
    count == 0,
    count == count[..., -1:],
  )
