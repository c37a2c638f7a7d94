"""English novels as bytes at T 4096, 2 layers, about 0.5M parameters.

Paper: Table 6 and Figure 10 (ablations, perplexity over the context) at a size
  for two CPU cores; see experiments/ablations and experiments/context_usage.
Command: python -m hope_jax.train --config=configs/books.py:hope \
  --config.data.path=runs/books --workdir=runs/books-hope
Modes: a model, optionally with `smoke`: `hope`, `titans,smoke`.
Data: the folder that experiments/texts/books.py makes: 81 novels to train on
  (60 MB), a passage of every held-out book for validation and test.
"""

from configs import _base, _models


def get_config(arg=None):
  """`arg` is a comma-separated list of modes; the default is `hope`."""
  name, switches = _base.parse(arg, "hope", _models.NAMES, "smoke")
  is_smoke = "smoke" in switches
  length = 2048 if is_smoke else 4096
  return _base.make(
    model=_models.model(
      name,
      "tiny",
      memory_chunks=(64, length // 32),
      cms_chunks=(length // 32, length // 8, 0),
      cms_signal="next_token",
      vocab_size=256,
      num_layers=2,
    ),
    opt={"peak_lr": 4e-3, "warmup_steps": 2 if is_smoke else 30},
    data={"path": "runs/books", "sequence_length": length, "batch_size": 1},
    train={
      "steps": 6 if is_smoke else 200,
      "log_every": 2 if is_smoke else 10,
      "eval_every": 3 if is_smoke else 100,
      "dynamics_every": 3 if is_smoke else 200,
      "checkpoint_every": 3 if is_smoke else 50,
    },
    eval={"batches": 2 if is_smoke else 0, "batch_size": 4},
  )
