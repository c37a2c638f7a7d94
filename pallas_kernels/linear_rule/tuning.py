"""Block sizes of the kernels, from a count of the bytes they hold on chip."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """How the chunks of a sequence are cut into the grid's steps.

  chunk_length: tokens per chunk.
  chunks: per step; the state is saved once per step, and backward holds that
    many states on chip.
  steps: of the grid, per head.
  parts: of the E rows of the state, on a GPU: one program each.
  num_warps: of a GPU's program.
  """

  chunk_length: int
  chunks: int
  steps: int
  parts: int = 1
  num_warps: int = 4

  def __post_init__(self):
    if min(dataclasses.astuple(self)) < 1:
      raise ValueError(f"{self}: every size must be at least 1.")

  @property
  def num_tokens(self) -> int:
    """Of all chunks, those that fill up the last ones included."""
    return self.chunk_length * self.chunks * self.steps


# v5e, v5p and v6e have 128 MiB of VMEM per core, of which the compiler gives a
# kernel 16 unless asked.  States and blocks take at most a quarter of what is
# asked for; the rest is for what a chunk's VJP computes with.
TPU_VMEM = 64 * 2**20
_TPU_BUDGET = TPU_VMEM // 4
_MAX_CHUNKS = 16


def tpu_blocks(
  num_tokens: int,
  chunk_length: int,
  *,
  key_dim: int,
  value_dim: int,
  has_momentum: bool,
) -> BlockSizes:
  """The most chunks per step whose backward pass fits, equal for all steps."""
  chunk_length = min(chunk_length, num_tokens)
  pad = lambda size, tile: -(-size // tile) * tile
  states = 4 * (1 + has_momentum) * pad(value_dim, 8) * pad(key_dim, 128)
  # x, u, queries, their gradients and that of the output, each in two buffers.
  rows = 4 * pad(key_dim, 128) + 3 * pad(value_dim, 128)
  tokens = 2 * 4 * pad(chunk_length, 8) * rows
  fit = max(1, _TPU_BUDGET // (states + tokens))
  num_chunks = -(-num_tokens // chunk_length)
  steps = -(-num_chunks // min(fit, _MAX_CHUNKS))
  return BlockSizes(chunk_length, chunks=-(-num_chunks // steps), steps=steps)


# What a GPU's program can hold: its state, of 64 K registers; a chunk's keys,
# of 227 KiB of shared memory, which the VJP's products need about ten times.
_GPU_STATE_BYTES = 32 * 2**10
_GPU_KEYS = 4096
_GPU_CHUNK = 16, 64


def gpu_blocks(
  num_tokens: int,
  chunk_length: int,
  *,
  key_dim: int,
  value_dim: int,
  has_momentum: bool,
) -> BlockSizes:
  """Chunks of a power of 2, at most `chunk_length` (the rule's result does not
  depend on it); as many rows of the state as fit, at least 16; a saved state
  for about as many bytes of tokens."""
  shortest, longest = _GPU_CHUNK
  longest = min(longest, chunk_length, _GPU_KEYS // key_dim)
  chunk_length = max(shortest, 1 << (longest.bit_length() - 1))
  row = 4 * (1 + has_momentum) * key_dim
  parts = 1
  while value_dim // parts > 16 and row * value_dim // parts > _GPU_STATE_BYTES:
    parts *= 2
  num_chunks = -(-num_tokens // chunk_length)
  tokens = 4 * chunk_length * (2 * key_dim + 2 * value_dim)
  chunks = min(num_chunks, max(1, min(4, row * value_dim // tokens)))
  return BlockSizes(
    chunk_length,
    chunks=chunks,
    steps=-(-num_chunks // chunks),
    parts=parts,
    num_warps=8 if chunk_length * key_dim >= _GPU_KEYS else 4,
  )
