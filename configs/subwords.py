"""WikiText-2 and novels in subwords: Table 2 at two sizes.

Paper: Table 2; see experiments/language_modeling (table2.py), which also
  prepares the data.
Command: python -m hope_jax.train --config=configs/subwords.py:hope \
  --workdir=runs/subwords-hope
Modes: a model, optionally with `gpu` (60M parameters, 105M tokens, T 2048,
  16,000 pieces; otherwise about 1.5M, 1.02M, T 512, 4,096 pieces) and with
  `smoke` (4 steps): `hope`, `titans,gpu`, `rwkv7,smoke`.
Data: the folders that experiments/texts/subwords.py makes.  Training mixes
  WikiText-2 and the novels one to five, in proportion to their sizes;
  validation and test are WikiText-2's own, whole.  105M tokens are five or six
  epochs of both.
Hardware: two CPU cores; `gpu` is for one GPU.
Measured: experiments/language_modeling has `t2`, 2026-11-27; `gpu` is not
  trained yet, its parameter counts are tested.
"""

from typing import NamedTuple

from configs import _base, _models


class Scale(NamedTuple):
  """What the prepared data and the model of a scale share.

  Attributes:
    size: key of `_models.SIZES`; for `tiny` the vocabulary comes on top of it.
    pieces: number of the tokenizer's pieces.
    align: documents begin at multiples of it.
  """

  size: str
  pieces: int
  length: int
  align: int

  @property
  def folder(self) -> str:
    """The folder of the prepared data."""
    return f"runs/subwords-{self.pieces}-{self.length}"


CPU = Scale("tiny", pieces=4096, length=512, align=64)
GPU = Scale("60m", pieces=16000, length=2048, align=256)
TEXTS = ("wikitext2", "novels")  # the first is also validated and tested on


def get_config(arg=None):
  """`arg` is a comma-separated list of modes; the default is `hope`."""
  name, switches = _base.parse(arg, "hope", _models.NAMES, "gpu", "smoke")
  is_gpu, is_smoke = "gpu" in switches, "smoke" in switches
  scale = GPU if is_gpu else CPU
  steps = 4 if is_smoke else 1600 if is_gpu else 500
  return _base.make(
    model=_models.model(
      name,
      scale.size,
      memory_chunks=(64, 256) if is_gpu else (16, 64),
      cms_chunks=(256, 1024, 0) if is_gpu else (64, 256, 0),
      cms_signal="next_token",
      vocab_size=scale.pieces,
      dtype="bfloat16" if is_gpu else "float32",
      remat="full" if is_gpu else "none",
    ),
    opt={
      "peak_lr": 1e-3 if is_gpu else 4e-3,
      "warmup_steps": 1 if is_smoke else 100 if is_gpu else 30,
    },
    data={
      "kind": "records",
      "path": ",".join(f"{scale.folder}/{text}" for text in TEXTS),
      "weights": (1.0, 5.0),
      "sequence_length": scale.length,
      "batch_size": 2 if is_smoke else 32 if is_gpu else 4,
    },
    train={
      "steps": steps,
      "log_every": 1 if is_smoke else 10,
      "dynamics_every": 2 if is_smoke else 200,
      "eval_every": 0,
      "checkpoint_every": 2 if is_smoke else 100,
    },
    eval={"batches": 2 if is_smoke else 0, "batch_size": 8 if is_gpu else 4},
  )
