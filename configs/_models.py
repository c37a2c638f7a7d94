"""The models and their sizes, matched in parameters: one table for all configs.

Every model of a size is within 3 % of the size's name (embeddings once, the
memories' initial states included).  The hidden width F of the FFN absorbs
what the sequence layers differ in; a continuum memory system (paper section
7) splits its F into two fast levels and a slow one.

  transformer       Transformer++: rotary attention, SwiGLU, no convolution
  transformer_conv  the same with a causal convolution of 4 on q, k and v,
                    which Titans and Hope have too
  titans            Titans (LMM): one deep memory per head
  hope              self-modifying Titans, then CMS
  hope_attention    attention (no convolution), then CMS
  retnet, deltanet, gated_deltanet, comba, mamba2
                    linear baselines, `hope_jax/models/linear.py`; Mamba2 has
                    no FFN and more layers instead
  rwkv7             RWKV-7, with its own block, `hope_jax/models/rwkv7.py`
  lstm              a nonlinear recurrence, `hope_jax/models/lstm.py`
  srwm              a self-referential weight matrix, `hope_jax/models/srwm.py`
"""

NAMES = (
  "transformer",
  "transformer_conv",
  "titans",
  "hope",
  "hope_attention",
  "retnet",
  "deltanet",
  "gated_deltanet",
  "comba",
  "mamba2",
  "rwkv7",
  "lstm",
  "srwm",
)

WITHOUT_CONVOLUTION = (
  "transformer",
  "hope_attention",
  "retnet",
  "rwkv7",
  "lstm",
  "srwm",
)

SIZES = {
  "tiny": {
    "shape": {"width": 128, "num_layers": 4, "num_heads": 2},
    "transformer": 448,
    "titans": 352,
    "hope": (64, 64, 96),
    "hope_attention": (128, 128, 192),
    "retnet": 288,
    "deltanet": 448,
    "gated_deltanet": 448,
    "comba": 448,
    "mamba2": {"ffn_hidden": 0, "num_layers": 7},
    "rwkv7": 544,
    "lstm": 288,
    "srwm": 512,
  },
  "3p9m": {  # scripts/benchmark.py
    "shape": {"width": 256, "num_layers": 4, "num_heads": 4},
    "transformer": 896,
    "titans": 768,
    "hope": (160, 160, 288),
    "hope_attention": (256, 256, 384),
    "retnet": 576,
    "deltanet": 896,
    "gated_deltanet": 736,
    "comba": 736,
    "mamba2": {"ffn_hidden": 0, "num_layers": 8},
    "rwkv7": 1184,
    "lstm": 560,
    "srwm": 1088,
  },
  "340m": {
    "shape": {"width": 1024, "num_layers": 24, "num_heads": 8},
    "transformer": 2816,
    "titans": 2304,
    "hope": (512, 512, 1024),
    "hope_attention": (768, 768, 1280),
    "retnet": 1408,
    "deltanet": 2816,
    "gated_deltanet": 2048,
    "comba": 2048,
    "mamba2": {"ffn_hidden": 0, "num_layers": 47},
    "rwkv7": 3840,
    "lstm": 1408,
    "srwm": 3712,
  },
  "760m": {
    "shape": {"width": 1536, "num_layers": 24, "num_heads": 12},
    "transformer": 4352,
    "titans": 3712,
    "hope": (896, 896, 1664),
    "hope_attention": (1024, 1024, 2304),
    "retnet": 2304,
    "deltanet": 4352,
    "gated_deltanet": 3328,
    "comba": 3328,
    "mamba2": {"ffn_hidden": 0, "num_layers": 48},
    "rwkv7": 6144,
    "lstm": 2304,
    "srwm": 5760,
  },
  "1p3b": {
    "shape": {"width": 2048, "num_layers": 24, "num_heads": 16},
    "transformer": 5632,
    "titans": 4864,
    "hope": (1152, 1152, 2304),
    "hope_attention": (1408, 1408, 2816),
    "retnet": 2944,
    "deltanet": 5632,
    "gated_deltanet": 4224,
    "comba": 4224,
    "mamba2": {"ffn_hidden": 0, "num_layers": 48},
    "rwkv7": 8192,
    "lstm": 2944,
    "srwm": 7552,
  },
}

# The inner rule: Titans' memory (2501.00663) has no erase term and learns
# the plain values by gradients at the chunk's first state.  Hope's memories
# (eq. 83-90) generate their own values and erase; the main one is thereby exact
# inside a chunk of any length (setting A): a fact is written at full strength,
# not at 1 / chunk length, and so is recalled (experiments/mqar).
MEMORIES = {
  "titans": {"adaptive": (), "target": "shared", "delta_rule": "none"},
  "hope": {
    "adaptive": ("k", "v", "eta", "alpha"),
    "target": "self",
    "setting": "token_exact",
    "delta_rule": "proximal",
    "initial_learn_rate": 4.0,
  },
}


def model(
  name: str,
  size: str,
  *,
  memory_chunks: tuple[int, int],
  cms_chunks: tuple[int, ...],
  cms_signal: str = "associative",
  **fields,
) -> dict:
  """The model group of `name` at `size`.

  `memory_chunks`: tokens per chunk of the memory and of the adaptive
  projections; `cms_chunks`: tokens between updates of each CMS level, 0
  never; `cms_signal`: what the levels learn from; `fields` are set as they are.
  """
  sequence_layer = name.removesuffix("_conv")
  row = SIZES[size]
  group = {
    "sequence_layer": sequence_layer,
    "conv_window": 0 if name in WITHOUT_CONVOLUTION else 4,
    "memory": {
      "chunk_length": memory_chunks[0],
      "projection_chunk_length": memory_chunks[1],
      **MEMORIES.get(name, {}),
    },
    **row["shape"],
  }
  hidden = row[sequence_layer]
  if isinstance(hidden, dict):
    return {**group, **hidden, **fields}
  if isinstance(hidden, int):
    return {**group, "ffn_hidden": hidden, **fields}
  group["cms"] = {
    "hidden": hidden,
    "chunk_lengths": cms_chunks,
    "signal": cms_signal,
  }
  return {**group, "ffn_hidden": sum(hidden), **fields}  # CMS has no ffn
