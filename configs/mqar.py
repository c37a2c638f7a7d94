"""Multi-query associative recall: does the memory work?

Protocol (after Arora et al. 2023): key-value pairs first, then each key once
  at a random place among fillers; the loss is on the value after each key.
  Nothing but the sequence tells which value belongs to a key, so a model can
  only answer from what it stored (chance is 1 / 64 = 1.6 %).
Command: python -m hope_jax.train --config=configs/mqar.py:titans \
  --workdir=runs/mqar-titans
Modes: a model: 8 pairs in 64 tokens; with `_32` or `_64`: so many pairs in 256
  or 512 tokens (`titans_32`); optionally with `smoke`: `titans_32,smoke`.
Size: 2 layers, width 128, 2 heads; 1.6M training tokens, 1,024 a step.
  Training begins with small problems (`data.train_pairs`): 300 steps of the
  smallest, then 300 of each larger size, the last for the rest.  Without, no
  model learned 32 pairs in this budget, attention included.
  Titans' chunk is short, 4 tokens (MAC's segment 16): with 16, a fact is
  written at 1/16 strength and from stale errors, and it reached 34 % instead
  of 99 % (lr 4e-3, a seed).
Expected: Titans and Hope at least 90 % at 8 pairs, their twins (--config.
  model.inner_rates=off) at most 30 %; see experiments/mqar.
"""

from configs import _base, _models

# Ending of the mode -> sizes of the problems in training; the last is tested.
PAIRS = {"": (2, 8), "_32": (4, 8, 32), "_64": (4, 16, 64)}
MODES = tuple(name + end for end in PAIRS for name in _models.NAMES)
STEPS, STAGE_STEPS, TOKENS_PER_STEP = 1600, 300, 1024


def get_config(arg=None):
  """`arg` is a comma-separated list of modes; the default is `titans`."""
  mode, switches = _base.parse(arg, "titans", MODES, "smoke")
  end = next((end for end in PAIRS if end and mode.endswith(end)), "")
  name = mode.removesuffix(end)
  is_smoke = "smoke" in switches
  sizes = PAIRS[end]
  length = 8 * sizes[-1]
  batch_size = TOKENS_PER_STEP // length
  return _base.make(
    model=_models.model(
      name,
      "tiny",
      memory_chunks=(4 if name.startswith("titans") else 16, 8 * sizes[0]),
      cms_chunks=(length // 8, length // 4, 0),
      vocab_size=129,
      num_layers=2,
    ),
    opt={"peak_lr": 4e-3, "warmup_steps": 2 if is_smoke else 50},
    data={
      "kind": "mqar",
      "num_pairs": sizes[-1],
      "train_pairs": sizes,
      "stage_examples": batch_size * (2 if is_smoke else STAGE_STEPS),
      "num_keys": 64,
      "num_values": 64,
      "sequence_length": length,
      "batch_size": batch_size,
    },
    train={
      "steps": 8 if is_smoke else STEPS,
      "log_every": 2 if is_smoke else 20,
      "eval_every": 4 if is_smoke else 200,
      "dynamics_every": 4 if is_smoke else 200,
      "checkpoint_every": 4 if is_smoke else 400,
    },
    eval={"batches": 2 if is_smoke else 16, "batch_size": 64},
  )
