"""Multi-query associative recall: does the memory work?

Protocol (after Arora et al. 2023): key-value pairs first, then each key once
  at a random place among fillers; the loss is on the value after each key.
  Nothing but the sequence tells which value belongs to a key, so a model can
  only answer from what it stored (chance is 1 / 64 = 1.6 %).
Command: python -m hope_jax.train --config=configs/mqar.py:titans \
  --workdir=runs/mqar-titans
Modes: a model alone: 8 pairs in 64 tokens; with `_32` or `_64`: 32 or 64 pairs
  in 256 or 512 tokens (`titans_32`); with `_4`: the recall of scripts/run.sh, 4
  pairs in 32 tokens from 8 keys and 8 values, by one layer of width 64, which
  takes a minute; optionally with `smoke`: `titans_32,smoke`.
Size: 2 layers, width 128, 2 heads; 1.6M training tokens, 1,024 a step.
  Training begins with small problems (`data.mqar.train_pairs`): 300 steps of
  the smallest, then 300 of each larger size, the largest for the rest.  Without
  this curriculum no model, not even attention, learned 32 pairs in this budget.
  Titans' chunk is short, 4 tokens (MAC's segment 16): with 16, a fact is
  written at 1/16 strength and from stale errors, and Titans reached 34 %
  instead of 99 % (lr 4e-3, one seed).
Expected: Titans and Hope at least 90 % at 8 pairs, their twins (--config.
  model.inner_rates=off) at most 30 %; see experiments/mqar.  `hope_4`: 99 %,
  its twin 12.5 %, which is chance there (2 seeds, 250 steps).
"""

from typing import Any

from configs import _base, _models

# Ending of the mode -> sizes of the problems in training; the last is tested.
PAIRS = {"": (2, 8), "_32": (4, 8, 32), "_64": (4, 16, 64), "_4": (4,)}
MODES = tuple(name + end for end in PAIRS for name in _models.NAMES)
STEPS, STAGE_STEPS, TOKENS_PER_STEP = 1600, 300, 1024
SMALL_STEPS, SMALL_RATE = 250, 8e-3
SHAPE: dict[str, Any] = {"num_layers": 2}
SMALL_SHAPE: dict[str, Any] = {"num_layers": 1, "width": 64}


def get_config(arg=None):
  """`arg` is a comma-separated list of modes; the default is `titans`."""
  mode, switches = _base.parse(arg, "titans", MODES, "smoke")
  end = next((end for end in PAIRS if end and mode.endswith(end)), "")
  name = mode.removesuffix(end)
  is_smoke, is_small = "smoke" in switches, end == "_4"
  sizes = PAIRS[end]
  words = 8 if is_small else 64  # keys, and as many values
  length = 8 * sizes[-1]
  batch_size = TOKENS_PER_STEP // length
  return _base.make(
    model=_models.model(
      name,
      "tiny",
      memory_chunks=(
        4 if name.startswith("titans") else 16,
        16 if is_small else 8 * sizes[0],
      ),
      cms_chunks=(length // 8, length // 4, 0),
      vocab_size=1 + 2 * words,
      **(SMALL_SHAPE if is_small else SHAPE),
    ),
    opt={
      "peak_lr": SMALL_RATE if is_small else 4e-3,
      "warmup_steps": 2 if is_smoke else 50,
    },
    data={
      "kind": "mqar",
      "mqar": {
        "num_pairs": sizes[-1],
        "train_pairs": sizes,
        "stage_examples": batch_size * (2 if is_smoke else STAGE_STEPS),
        "num_keys": words,
        "num_values": words,
      },
      "sequence_length": length,
      "batch_size": batch_size,
    },
    train={
      "steps": 8 if is_smoke else SMALL_STEPS if is_small else STEPS,
      "log_every": 2 if is_smoke else 20,
      "eval_every": 4 if is_smoke else 200,
      "dynamics_every": 4 if is_smoke else 200,
      "checkpoint_every": 4 if is_smoke else 400,
    },
    eval={"batches": 2 if is_smoke else 16, "batch_size": 64},
  )
