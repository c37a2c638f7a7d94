"""Memories as one TPU kernel per sequence and head: `fused_scan`.

The XLA path applies its functions to a chunk of all heads; a kernel applies the
same functions to a chunk of one head.  Fast weights and momenta stay in VMEM
from the first chunk to the last.

Legend: B batch, H heads, T tokens, N chunks, C chunk length.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from flax.typing import ArrayPytree as Tree

from hope_jax.config import ConfigError, MemoryConfig
from hope_jax.memory import chunks, devices
from pallas_kernels.common import scan
from pallas_kernels.linear_rule import one_chunk as chunk_lib

KERNEL = chunk_lib.Arithmetic(in_kernel=True)


def kernel(function: Callable, cfg: MemoryConfig, *, name: str) -> Tree:
  """`chunks.Memory.kernel` of `function` (see `_Step`); None if not chosen."""
  if not is_chosen(cfg.implementation):
    return None
  return functools.partial(run, function, cfg, name=name)


@functools.cache
def is_chosen(implementation: str) -> bool:
  """Whether `memory.implementation` selects the kernels.

  Raises:
    ConfigError: it selects kernels that memories do not have.
  """
  if implementation == "auto":
    backend = jax.default_backend()
    implementation = "pallas_tpu" if backend == "tpu" else "xla"
    logging.info("memory.implementation=auto uses %s.", implementation)
  if implementation == "pallas_gpu":
    raise ConfigError(
      "memory.implementation=pallas_gpu: memories have no kernel for GPUs,"
      " take xla"
    )
  return implementation in ("pallas_tpu", "pallas_interpret")


@dataclasses.dataclass(frozen=True)
class _Step:
  """`function` on one chunk of one head.

  function(initial, now, x, live, cfg) -> (what is read, the state after), with
  `live` [C] as in `chunk_decays`.  Only the first `num_tokens` places of the
  sequence hold a token; the others are padding.
  """

  function: Callable
  cfg: MemoryConfig
  num_tokens: int
  length: int

  def __call__(
    self, initial: Tree, now: chunks.Fast, x: Tree, index: jax.Array
  ) -> tuple[Tree, chunks.Fast]:
    tokens, begins = x
    if begins is not None:
      now = self._restart(initial, now, begins)
    live = None
    if self.num_tokens % self.length:
      live = chunk_lib.live_tokens(index, self.length, self.num_tokens)
    return self.function(initial, now, tokens, live, self.cfg)

  def _restart(
    self, initial: Tree, now: chunks.Fast, begins: jax.Array
  ) -> chunks.Fast:
    """The state of a new document where `begins` [1] is 1."""

    def choose(new, old):
      is_new = begins.reshape((1,) * old.ndim)
      return is_new * new + (1 - is_new) * old

    state = jax.tree.map(lambda old: choose(0, old), now)
    if self.cfg.retention == "zero":
      weight = jax.tree.map(choose, initial, now.weight)
      state = dataclasses.replace(state, weight=weight)
    return state


def run(
  function: Callable,
  cfg: MemoryConfig,
  initial: Tree,
  state: chunks.ChunkState,
  tokens: Tree,
  *,
  chunk_length: int,
  return_state: bool,
  docs: chunks.Documents | None,
  name: str,
) -> tuple[Tree, chunks.ChunkState | None]:
  """(outputs, state after) of tokens that begin at a chunk's border.

  Args:
    function: of one chunk of one head, see `_Step`; a module-level function.
    initial: M_0, any tree of [H, ...].
    state: what the rule acts on, [B, H, ...].
    tokens: any tree of [B, H, T, ...].
    return_state, docs: as in `chunks.scan_chunks`.
    name: the kernels' name.
  """
  # Imported here, so that only kernels wait for Pallas.
  from pallas_kernels.common import fused_scan

  num_tokens = jax.tree.leaves(tokens)[0].shape[2]
  length = min(chunk_length, num_tokens)
  step = _Step(function, cfg, num_tokens, length)

  def run_here(initial, now, tokens, begins):
    batch, heads = jax.tree.leaves(tokens)[0].shape[:2]
    split = lambda x: x.reshape(batch, heads, *x.shape[1:])

    def by_chunk(x):
      """[B, H, T, ...] -> [B H, N, C, ...]."""
      return scan.fold_chunks(x.reshape(-1, *x.shape[2:]), length, 1)

    if begins is not None:
      begins = jnp.repeat(begins.T, heads, axis=0)[..., None]
      begins = begins.astype(jnp.float32)
    ys, state = fused_scan.fused_scan(
      step,
      jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), now),
      (jax.tree.map(by_chunk, tokens), begins),
      initial,
      name=name,
      interpret=cfg.implementation == "pallas_interpret",
    )
    by_token = lambda y: split(y.reshape(y.shape[0], -1, *y.shape[3:]))
    ys = jax.tree.map(lambda y: by_token(y)[:, :, :num_tokens], ys)
    return ys, jax.tree.map(split, state)

  begins = None if docs is None else docs.begins
  run_here = devices.by_heads(run_here, ("H", "BH", "BH", "NB"))
  ys, now = run_here(initial, state.now, tokens, begins)
  return ys, chunks.ChunkState(now, None, None) if return_state else None
