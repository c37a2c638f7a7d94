"""What all configs share: every field with its default, and `make`.

Every field stands here because a command line can only override a field
that the config has (`--config.model.memory.error_clip=0.5`).  The meaning of
each is documented where it is used, in `hope_jax/config.py`; a test holds
the two lists together.
"""

from typing import TYPE_CHECKING

from hope_jax.config import fields

if TYPE_CHECKING:
  import ml_collections

DEFAULTS = {
  "model": {
    "sequence_layer": "transformer",
    "vocab_size": 256,
    "width": 128,
    "num_layers": 4,
    "num_heads": 2,
    "num_kv_heads": 0,
    "ffn_hidden": 448,
    "conv_window": 4,
    "attention_window": 0,
    "persistent_tokens": 0,
    "context_length": 4096,
    "rope_base": 10000.0,
    "rope_scaling": {
      "factor": 1.0,
      "low_frequency_factor": 1.0,
      "high_frequency_factor": 4.0,
      "original_context_length": 8192,
    },
    "norm_eps": 1e-6,
    "initializer": "normal",
    "tied_embeddings": True,
    "memory": {
      "architecture": "mlp",
      "hidden": 0,
      "activation": "silu",
      "adaptive": ("k", "v", "eta", "alpha"),
      "target": "self",
      "setting": "chunk_l2",
      "delta_rule": "proximal",
      "momentum": "averaged",
      "retention": "start",
      "step_scale": "mean",
      "proximal": True,
      "loss_factor": 0.5,
      "error_clip": 1.0,
      "target_clip": 4.0,
      "read": "token_pre",
      "chunk_length": 64,
      "projection_chunk_length": 256,
      "half_life_min": 64.0,
      "half_life_max": 16384.0,
      "initial_learn_rate": 0.7,
      "initial_momentum": 0.88,
      "remat": "sqrt",
      "implementation": "auto",
    },
    "cms": {
      "hidden": (),
      "chunk_lengths": (),
      "step_tokens": 0,
      "connection": "sequential",
      "signal": "associative",
      "value": "mixer_pair",
      "learning_share": 0.25,
      "outer_order": 2,
      "half_life": 0.0,
      "initial_learn_rate": 0.1,
      "error_clip": 1.0,
    },
    "inner_rates": "on",
    "frozen_levels": (),
    "dtype": "float32",
    "remat": "none",
  },
  "opt": {
    "peak_lr": 1e-3,
    "end_lr_ratio": 0.1,
    "warmup_steps": 50,
    "weight_decay": 0.1,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "clip_norm": 1.0,
    "memory_lr_ratio": 1.0,
  },
  "data": {
    "kind": "text",
    "path": "hope_jax/data/tiny_shakespeare.txt",
    "tokenizer": "bytes",
    "split": (0.9, 0.05),
    "sequence_length": 256,
    "batch_size": 8,
    "num_pairs": 8,
    "num_keys": 32,
    "num_values": 32,
    "train_pairs": (),
    "stage_examples": 0,
    "weights": (),
    "long_share": 0.0,
    "workers": 0,
    "timeout": 600.0,
    "seed": 0,
  },
  "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
  "train": {
    "steps": 500,
    "seed": 0,
    "accumulate": 1,
    "init_from": "",
    "carry_state": False,
    "log_every": 10,
    "dynamics_every": 100,
    "eval_every": 100,
    "checkpoint_every": 100,
    "keep_checkpoints": 2,
    "keep_best": 0,
    "max_bad_steps": 10,
    "rollback_factor": 0.0,
    "max_rollbacks": 3,
    "hang_seconds": 1800.0,
    "wandb": "off",
    "wandb_project": "hope_jax",
  },
  "eval": {"batches": 0, "batch_size": 8},
}


def make(**groups: dict) -> "ml_collections.ConfigDict":
  """DEFAULTS with the given fields changed; a new field is a KeyError."""
  import ml_collections  # which scripts/gpu_check has to do without

  config = ml_collections.ConfigDict(DEFAULTS)
  config.lock()
  config.update(groups)
  return config


def parse(
  arg: str | None, default: str, names: tuple[str, ...], *switches: str
) -> tuple[str, set[str]]:
  """Splits a mode, `"hope,smoke"`, into a model's name and its switches."""
  words = arg.split(",") if arg else []
  for word in words:
    if word not in (*names, *switches):
      known = (*names, *switches)
      raise ValueError(
        f"unknown mode {word!r}{fields.nearest(word, known)}"
        f" (all: {', '.join(known)})"
      )
  chosen = [word for word in words if word in names] or [default]
  if len(chosen) > 1:
    raise ValueError(f"mode {arg!r} names more than one model")
  return chosen[0], set(words) - {chosen[0]}
