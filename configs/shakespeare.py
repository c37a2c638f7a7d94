"""Tiny Shakespeare, bytes, about 1M parameters: the run of scripts/run.sh.

Paper: Table 2's comparison (Transformer++, Titans, Hope at equal tokens) at
  a size that trains in minutes on two CPU cores.
Command: python -m hope_jax.train --config=configs/shakespeare.py:hope \
  --workdir=runs/shakespeare-hope
Modes: a model, optionally with `long` (T 1024, two sequences a step, as in
  experiments/language_modeling) or `smoke` (8 steps, well under a minute):
  `hope`, `titans,long`, `hope,smoke`; `smoke` alone is Hope.
Data: the file embedded in hope_jax/data, 1.1 MB; 90 % train, 5 % validation,
  5 % test by position.  One epoch at T 256 is 490 steps of 8 x 256.
"""

from configs import _base, _models

# Peak learning rate: the best of 2e-3, 4e-3, 8e-3 by validation loss in
# experiments/language_modeling; models that are not in it take DEFAULT_LR.
PEAK_LR = {
  "transformer": 2e-3,
  "transformer_conv": 8e-3,
  "titans": 2e-3,
  "hope": 4e-3,
}
DEFAULT_LR = 4e-3


def get_config(arg=None):
  """`arg` is a comma-separated list of modes; the default is `hope`."""
  name, switches = _base.parse(arg, "hope", _models.NAMES, "long", "smoke")
  is_long, is_smoke = "long" in switches, "smoke" in switches
  return _base.make(
    model=_models.model(
      name,
      "tiny",
      memory_chunks=(16, 64) if is_long else (64, 64),
      cms_chunks=(64, 256, 0) if is_long else (32, 128, 0),
      cms_signal="next_token",
      vocab_size=256,
    ),
    opt={
      "peak_lr": PEAK_LR.get(name, DEFAULT_LR),
      "warmup_steps": 2 if is_smoke else 30,
      "weight_decay": 0.1,
    },
    data={
      "sequence_length": 1024 if is_long else 256,
      "batch_size": 2 if is_long or is_smoke else 8,
    },
    train={
      "steps": 8 if is_smoke else 150,
      "log_every": 2 if is_smoke else 10,
      "eval_every": 4 if is_smoke else 100,
      "dynamics_every": 4 if is_smoke else 100,
      "checkpoint_every": 4 if is_smoke else 100,
    },
    eval={"batches": 2 if is_smoke else 0, "batch_size": 2 if is_long else 8},
  )
