"""Learning rates over a run."""

import optax

from hope_jax.config import OptConfig


def warmup_cosine(config: OptConfig, steps: int) -> optax.Schedule:
  """Linear from 0 over `warmup_steps`, then a cosine decay until `steps`.

  Runs shorter than twice the warm-up spend half of their steps on it.

  Update number s (from 0) uses schedule(s + 1), so that the first update is
  not wasted on rate 0.
  """
  warmup = min(config.warmup_steps, steps // 2)
  cosine = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.peak_lr,
    warmup_steps=warmup,
    decay_steps=steps,
    end_value=config.peak_lr * config.end_lr_ratio,
  )
  return lambda count: cosine(count + 1)
