import jax
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


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
  """Compiles the same program once a session, in child processes, too."""
  folder = str(tmp_path_factory.mktemp("compiled"))
  options = [
    ("jax_compilation_cache_dir", folder),
    ("jax_persistent_cache_min_compile_time_secs", 0.1),
    ("jax_persistent_cache_min_entry_size_bytes", 0),
  ]
  old = [(name, getattr(jax.config, name)) for name, _ in options]
  for name, value in options:
    jax.config.update(name, value)
  yield {name.upper(): str(value) for name, value in options}
  for name, value in old:
    jax.config.update(name, value)
