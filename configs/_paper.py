"""The paper's recipe for language models, shared by its three sizes.

32,000 subwords (as many as Llama 2, but of a tokenizer trained here), T 4096,
batches of 0.5M tokens, AdamW 4e-4 with a cosine, 1B tokens of warm-up, weight
decay 0.1, betas 0.9 / 0.95, clip 1 (Titans, 2501.00663, and Gated DeltaNet's
recipe, which it follows).  The CMS learns from next-token prediction, the
objective of the task at hand (paper section 7.1).
"""

from configs import _base, _models

LENGTH, BATCH_SIZE = 4096, 128  # 524,288 tokens a step
WARMUP_TOKENS = 1e9
SMOKE_MODEL = {"cms_chunks": (64, 128, 0), "vocab_size": 512}
SMOKE = {
  "opt": {"warmup_steps": 1},
  "data": {
    "path": "data/fineweb_edu_smoke",
    "sequence_length": 256,
    "batch_size": 2,
  },
  "train": {
    "steps": 4,
    "log_every": 1,
    "dynamics_every": 2,
    "eval_every": 2,
    "checkpoint_every": 2,
  },
  "eval": {"batches": 1, "batch_size": 2},
}


def model(name: str, size: str, **fields) -> dict:
  """The model group of the recipe; `fields` override it."""
  group = {
    "memory_chunks": (64, 256),
    "cms_chunks": (128, 512, 0),
    "cms_signal": "next_token",
    "vocab_size": 32000,
    "dtype": "bfloat16",
    "remat": "full",
  }
  return _models.model(name, size, **{**group, **fields})


def recipe(arg: str | None, size: str, tokens: float):
  """The config of a model of `size` trained on `tokens` tokens.

  `smoke` keeps dtype, remat and the kind of data, but uses the tiny model, few
  subwords and short examples, so that it runs on a CPU.
  """
  name, switches = _base.parse(arg, "hope", _models.NAMES, "smoke")
  is_smoke = "smoke" in switches
  tokens_per_step = LENGTH * BATCH_SIZE
  config = _base.make(
    model=model(name, "tiny", **SMOKE_MODEL) if is_smoke else model(name, size),
    opt={
      "peak_lr": 4e-4,
      "warmup_steps": int(WARMUP_TOKENS) // tokens_per_step,
      "weight_decay": 0.1,
      "b1": 0.9,
      "b2": 0.95,
      "clip_norm": 1.0,
    },
    data={
      "kind": "records",
      "path": "data/fineweb_edu",
      "records": {"long_share": 0.25},
      "sequence_length": LENGTH,
      "batch_size": BATCH_SIZE,
    },
    train={
      "steps": int(tokens) // tokens_per_step,
      "dynamics_every": 500,
      "eval_every": 1000,
      "checkpoint_every": 1000,
    },
    eval={"batch_size": 32},
  )
  if is_smoke:
    config.update(SMOKE)
  return config
