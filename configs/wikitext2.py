"""WikiText-2 as bytes at T 1024, about 1M parameters.

Paper: the Wiki perplexity column of Table 2, at a size for two CPU cores.
Command: python -m hope_jax.train --config=configs/wikitext2.py:hope \
  --config.data.path=data/wikitext2 --workdir=runs/wikitext2-hope
Modes: a model, optionally with `smoke`: `hope`, `titans,smoke`.
Data: a folder with train.txt, valid.txt and test.txt (10.8, 1.1 and 1.3 MB in
  the tokenized form, CC BY-SA).  500 steps of 2 x 1024 read 1.0 MB.  Held-out
  loss is taken on the first 128 sequences of a split; --config.eval.batches=0
  takes the whole split.
"""

from configs import _base, _models


def get_config(arg=None):
  """`arg` is a comma-separated list of modes; the default is `hope`."""
  name, switches = _base.parse(arg, "hope", _models.NAMES, "smoke")
  is_smoke = "smoke" in switches
  return _base.make(
    model=_models.model(
      name,
      "tiny",
      memory_chunks=(16, 64),
      cms_chunks=(64, 256, 0),
      cms_signal="next_token",
      vocab_size=256,
    ),
    opt={"peak_lr": 4e-3, "warmup_steps": 2 if is_smoke else 30},
    data={
      "path": "data/wikitext2",
      "sequence_length": 1024,
      "batch_size": 2,
    },
    train={
      "steps": 6 if is_smoke else 500,
      "log_every": 2 if is_smoke else 10,
      "eval_every": 3 if is_smoke else 250,
      "dynamics_every": 3 if is_smoke else 100,
      "checkpoint_every": 3 if is_smoke else 100,
    },
    eval={"batches": 2 if is_smoke else 32, "batch_size": 4},
  )
