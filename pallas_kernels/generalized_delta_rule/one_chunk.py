"""The generalized delta rule over one chunk, with matrix products.

With L_t the sum of log w over the chunk's tokens up to t, u_t = S_{t-1} p_t
what the erase reads, and for i <= t

  S_t = S_0 diag(e^{L_t}) + sum_i (u_i b_i^T + v_i k_i^T) diag(e^{L_t - L_i}),

so that, strictly lower triangular in t and i,

  (I - <p_t, b_i>) U = <p_t, S_0> + <p_t, k_i> V,
      <p_t, x_i> = sum_c p_tc x_ic e^{L_{t-1,c} - L_{i,c}}

is one unit lower triangular system per chunk; outputs and the chunk's last
state are products again.  Exact for any chunk length (docs/equations.md, "The
generalized delta rule").

The decays differ by channel, so the products <., .> split them into the factors
e^{L_t} and e^{-L_i}.  A channel keeps at least e^{-f} of itself per token, with
f = e^{-1/2} in RWKV-7 (0.545): over C tokens -f C <= L <= 0.  Both factors are
taken relative to the middle of that range and stay within e^{f C / 2}; their
products above the diagonal, which are masked, stay within e^{f C}.  float32
holds that up to f C = `LARGEST_EXPONENT`.  Every factor has a relative error of
f C 6e-8, which no subtraction amplifies.  (The middle of the actual decays
would be nearer, but then a later token would affect an earlier one's rounding.)

Dimensions: B batch, H heads, C chunk length, K key dim, E value dim.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.generalized_delta_rule.reference import Tokens
from pallas_kernels.linear_rule.one_chunk import unit_lower_inverse

MAX_CHUNK_LENGTH = 128
FASTEST_DECAY = math.exp(-0.5)  # of RWKV-7, -log w
LARGEST_EXPONENT = FASTEST_DECAY * MAX_CHUNK_LENGTH

_einsum = functools.partial(jnp.einsum, precision="highest")


def longest_chunk(fastest_decay: float) -> int:
  """The longest chunk whose decay factors float32 can hold."""
  if fastest_decay > FASTEST_DECAY:
    return int(LARGEST_EXPONENT / fastest_decay)
  return MAX_CHUNK_LENGTH


def chunk_rule(
  weight: jax.Array, tokens: Tokens, *, fastest_decay: float
) -> tuple[jax.Array, jax.Array]:
  """Solves one chunk (module docstring): returns (S_C, O).

  tokens: [B, H, C, ...], their log_decay within -fastest_decay .. 0.
  """
  k, v, r, log_w, p, b, reset = tokens
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


def _masks(
  reset: jax.Array | None, shape: tuple[int, ...]
) -> tuple[jax.Array, ...]:
  """Masks of what token t sees (the writes i < t, the writes i <= t, S_0), and
  of the writes that the chunk's end sees.

  Two tokens see each other if no reset lies between them.
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
