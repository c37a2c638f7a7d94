"""The blocks of the GPU kernel of `linear_rule`."""

import pytest

from pallas_kernels.linear_rule import tuning


def test_gpu_blocks_cover_all_tokens():
  for tokens in (1, 7, 64, 65, 1000, 4096, 100_003):
    for chunk_length in (1, 16, 64, 256):
      found = tuning.gpu_blocks(
        tokens, chunk_length, key_dim=128, value_dim=64, has_momentum=True
      )
      assert found.chunk_length <= max(16, chunk_length)
      group = found.chunk_length * found.chunks
      assert tokens <= found.num_tokens < tokens + group


def test_block_sizes_validate():
  with pytest.raises(ValueError, match="at least 1"):
    tuning.BlockSizes(16, 0, 1)
