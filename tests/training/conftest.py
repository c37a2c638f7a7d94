import pytest

from hope_jax.config import (
  Config,
  DataConfig,
  EvalConfig,
  OptConfig,
  TrainConfig,
)
from hope_jax.model_config import ModelConfig


@pytest.fixture
def tiny():
  """A run of seconds: 2 layers, width 16, 32 tokens of Shakespeare."""
  return Config(
    model=ModelConfig(width=16, num_layers=2, num_heads=2, ffn_hidden=32),
    opt=OptConfig(peak_lr=1e-2, warmup_steps=2),
    data=DataConfig(sequence_length=32, batch_size=4),
    train=TrainConfig(
      steps=6,
      log_every=2,
      eval_every=3,
      checkpoint_every=2,
      dynamics_every=4,
    ),
    eval=EvalConfig(batches=2, batch_size=4),
  )
