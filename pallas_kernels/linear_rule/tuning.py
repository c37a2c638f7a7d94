"""Block sizes of the GPU kernels, from what they hold on chip."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """How a head's tokens and state are divided.

  chunk_length: tokens per chunk.
  chunks: chunks per group; the state is saved once per group.
  groups: groups per head.
  parts: parts of the state's E rows, with one program each.
  num_warps: warps per program.
  """

  chunk_length: int
  chunks: int
  groups: int
  parts: int = 1
  num_warps: int = 4

  def __post_init__(self):
    if min(dataclasses.astuple(self)) < 1:
      raise ValueError(f"{self}: every size must be at least 1.")

  @property
  def num_tokens(self) -> int:
    """The tokens of all chunks, padding included."""
    return self.chunk_length * self.chunks * self.groups


# What a program on a GPU can hold: its state, in 64 K registers; a chunk's
# keys, in 227 KiB of shared memory: the VJP's products need about ten times
# their size.
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
  """Chunks of a power of 2 from 16 on, else at most `chunk_length` (the rule's
  result does not depend on it); as many rows of the state as fit, at least 16;
  a saved state for about as many bytes of tokens."""
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
    groups=-(-num_chunks // chunks),
    parts=parts,
    num_warps=8 if chunk_length * key_dim >= _GPU_KEYS else 4,
  )
