"""Critical rates of the inner rule: the largest step that stays bounded.

One matrix memory sees the same unit key and a zero target again and again,
without forgetting (alpha = 1).  Along that key the fast state is two numbers,
its weight D and its momentum S, and a chunk maps them linearly.  The 2 x 2 map
is read off the library by sending D = 1 and S = 1 through one chunk of
`deep.run_memory` (`rules.layer_rates`, then `linear_rule`); D and S stay
bounded exactly if its spectral radius is at most 1.  eta' is given directly:
no proximal map, no clipping.

Legend: N pairs of rates, C chunk length; one batch row, head and dimension
each.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.config import MemoryConfig
from hope_jax.memory import chunks, deep
from hope_jax.memory.architectures import Weights
from hope_jax.memory.rules import Gates

CHUNK_LENGTHS = (1, 4, 16, 64)
MOMENTA = (0.0, 0.5, 0.9)
# The rules of the table, as fields of MemoryConfig.
RULES = {
  "L2 factor 1/2 + DGD, both / C": {"loss_factor": 0.5},
  "L2 factor 1 + DGD, both / C": {"loss_factor": 1.0},
  "L2 factor 1 + DGD, not / C": {"loss_factor": 1.0, "step_scale": "sum"},
  "dot product + DGD, not / C": {
    "setting": "token_exact",
    "step_scale": "sum",
  },
}
# The expected rates: momentum -> C = 1, 4, 16, 64.
EXPECTED = {
  "L2 factor 1/2 + DGD, both / C": (
    ("1", ">2", ">2", ">2"),
    ("1.5", ">2", ">2", ">2"),
    ("1.9", ">2", ">2", ">2"),
  ),
  "L2 factor 1 + DGD, both / C": (
    (".67", ".96", "1.06", "1.09"),
    ("1.2", "1.46", "1.16", "1.11"),
    ("1.8", ">2", ">2", "1.36"),
  ),
  "L2 factor 1 + DGD, not / C": (
    (".67", ".24", ".07", ".02"),
    ("1.2", ".36", ".07", ".02"),
    ("1.8", ">2", ".21", ".02"),
  ),
  "dot product + DGD, not / C": (("2",) * 4,) * 3,
}
LIMIT = 4.0  # the search's end: twice the expected rate
_GRID = 200  # rates tried before the bisection
_BISECTIONS = 16
_TOLERANCE = 1e-5  # float32: a radius of 1 may come out larger


def memory_config(rule: str, chunk_length: int) -> MemoryConfig:
  """A Titans-like matrix memory that learns by `rule`."""
  return MemoryConfig(
    architecture="matrix",
    adaptive=(),
    target="shared",
    retention="none",
    proximal=False,
    error_clip=0.0,
    remat="none",
    chunk_length=chunk_length,
    **RULES[rule],
  )


@functools.partial(jax.jit, static_argnames="cfg")
def chunk_map(
  rates_N: jax.Array, momenta_N: jax.Array, cfg: MemoryConfig
) -> jax.Array:
  """The linear map of (D, S) over one chunk, for N rates: [N, 2, 2]."""
  count, length = rates_N.shape[0], cfg.chunk_length
  unit = jnp.repeat(jnp.eye(2), count, axis=0)  # rows D = 1, then rows S = 1
  weight, momentum = (x.reshape(-1, 1, 1, 1) for x in (unit[:, 0], unit[:, 1]))
  state = chunks.fresh(
    chunks.Fast(Weights(None, weight), Weights(None, momentum)),
    length,
    length,
  )
  tokens = lambda x: jnp.broadcast_to(
    jnp.tile(x, 2)[:, None, None], (2 * count, 1, length)
  )
  ones = jnp.ones((2 * count, 1, length))
  key = ones[..., None]
  out = deep.run_memory(
    Weights(None, jnp.zeros((1, 1, 1))),
    deep.Tokens(
      key, 0 * key, key, Gates(tokens(rates_N), ones, tokens(momenta_N))
    ),
    cfg,
    state=state,
  )
  assert out.state is not None
  after = [
    getattr(out.state.now, name).output.reshape(2, count)
    for name in ("weight", "momentum")
  ]
  return jnp.stack(after, axis=0).transpose(2, 0, 1)


def radius(
  rates: np.ndarray, momenta: np.ndarray, cfg: MemoryConfig
) -> np.ndarray:
  """Growth of D and S per chunk [N], infinite where a chunk overflows."""
  arrays = (jnp.asarray(x, jnp.float32) for x in (rates, momenta))
  maps = np.asarray(chunk_map(*arrays, cfg=cfg), np.float64)
  is_finite = np.all(np.isfinite(maps), axis=(1, 2))
  maps = np.where(is_finite[:, None, None], maps, 0.0)
  growth = np.abs(np.linalg.eigvals(maps)).max(axis=1)
  return np.where(is_finite, growth, np.inf)


def critical_rate(
  rule: str, chunk_length: int, momentum: float, limit: float = LIMIT
) -> float | None:
  """The first eta' below `limit` beyond which the memory blows up; None: none.

  A grid finds the first rate that is not bounded, since a larger rate may be
  bounded again; bisection then finds the border.
  """
  cfg = memory_config(rule, chunk_length)

  def is_bounded(rates: np.ndarray) -> np.ndarray:
    momenta = np.full(len(rates), momentum)
    return np.asarray(radius(rates, momenta, cfg) <= 1.0 + _TOLERANCE)

  grid = np.linspace(0.0, limit, _GRID + 1)[1:]
  failed = np.flatnonzero(~is_bounded(grid))
  if not len(failed):
    return None
  high = grid[failed[0]]
  low = high - grid[0]
  for _ in range(_BISECTIONS):
    middle = (low + high) / 2
    if is_bounded(np.array([middle]))[0]:
      low = middle
    else:
      high = middle
  return float(low)


def agrees(found: float | None, expected: str) -> bool:
  """Whether `found` is `expected` to its digits; `>2`: none is below 2."""
  if expected.startswith(">"):
    return found is None or found > float(expected[1:]) - 1e-3
  if found is None:
    return False
  digits = max(1, len(expected.partition(".")[2]))
  return abs(found - float(expected)) <= 0.51 * 10.0**-digits


def measure(rule: str, chunk_length: int, momentum: float) -> dict[str, Any]:
  """The critical rate of one entry of the table, beside the expected one."""
  found = critical_rate(rule, chunk_length, momentum)
  row = EXPECTED[rule][MOMENTA.index(momentum)]
  expected = row[CHUNK_LENGTHS.index(chunk_length)]
  return {
    "rule": rule,
    "momentum": momentum,
    "chunk_length": chunk_length,
    "found": None if found is None else round(found, 4),
    "expected": expected,
    "agrees": agrees(found, expected),
  }
