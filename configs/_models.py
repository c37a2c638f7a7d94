"""The models and their sizes, matched in parameters: one table for all configs.

Every model of a size is within 3 % of the size's name (embeddings once, the
memories' initial states included).  The hidden width F of the FFN makes up for
the differences between sequence layers; a continuum memory system (paper
section 7) splits its F into two fast levels and a slow one.

  transformer       Transformer++: rotary attention, SwiGLU, no convolution
  transformer_conv  the same with a causal convolution over 4 tokens on q, k
                    and v, as in Titans and Hope
  titans            Titans (LMM): one deep memory per head
  titans_mac, titans_mag, titans_mal
                    with attention, `hope_jax/models/titans_attention.py`
  dla, memora       deep memories with other rules, `hope_jax/models/titans.py`
  ttt_linear, ttt_mlp
                    test-time training, `hope_jax/models/ttt.py`
  hope              self-modifying Titans, then CMS
  hope_attention    attention (no convolution), then CMS
  retnet, deltanet, gated_deltanet, comba, mamba2
                    linear baselines, `hope_jax/models/linear.py`; Mamba2 has
                    no FFN and more layers instead
  mamba             the first Mamba, without FFN like Mamba2
  samba             Mamba and attention with a window (2K, in small models half
                    a training sequence) in turn, each with an FFN
  rwkv7             RWKV-7, with its own block, `hope_jax/models/rwkv7.py`
  lstm              a nonlinear recurrence, `hope_jax/models/lstm.py`
  srwm              a self-referential weight matrix, `hope_jax/models/srwm.py`
"""

NAMES = (
  "transformer",
  "transformer_conv",
  "titans",
  "titans_mac",
  "titans_mag",
  "titans_mal",
  "dla",
  "memora",
  "ttt_linear",
  "ttt_mlp",
  "hope",
  "hope_attention",
  "retnet",
  "deltanet",
  "gated_deltanet",
  "comba",
  "mamba2",
  "mamba",
  "samba",
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
    "titans_mac": 256,
    "titans_mag": {"ffn_hidden": 192, "attention_window": 128},
    "titans_mal": {"ffn_hidden": 192, "attention_window": 128},
    "dla": 224,
    "memora": 224,
    "ttt_linear": 416,
    "ttt_mlp": 288,
    "hope": (64, 64, 96),
    "hope_attention": (128, 128, 192),
    "retnet": 288,
    "deltanet": 448,
    "gated_deltanet": 448,
    "comba": 448,
    "mamba2": {"ffn_hidden": 0, "num_layers": 7},
    "mamba": {"ffn_hidden": 0, "num_layers": 8, "width": 132},
    "samba": {"ffn_hidden": 384, "attention_window": 128},
    "rwkv7": 544,
    "lstm": 288,
    "srwm": 512,
  },
  "3p9m": {  # scripts/benchmark.py
    "shape": {"width": 256, "num_layers": 4, "num_heads": 4},
    "transformer": 896,
    "titans": 768,
    "titans_mac": 576,
    "titans_mag": {"ffn_hidden": 416, "attention_window": 256},
    "titans_mal": {"ffn_hidden": 416, "attention_window": 256},
    "dla": 640,
    "memora": 640,
    "ttt_linear": 864,
    "ttt_mlp": 736,
    "hope": (160, 160, 288),
    "hope_attention": (256, 256, 384),
    "retnet": 576,
    "deltanet": 896,
    "gated_deltanet": 736,
    "comba": 736,
    "mamba2": {"ffn_hidden": 0, "num_layers": 8},
    "mamba": {"ffn_hidden": 0, "num_layers": 9},
    "samba": {"ffn_hidden": 768, "attention_window": 256},
    "rwkv7": 1184,
    "lstm": 560,
    "srwm": 1088,
  },
  "60m": {  # configs/subwords.py, 16,000 pieces
    "shape": {"width": 512, "num_layers": 16, "num_heads": 4},
    "transformer": 1408,
    "titans": 1152,
    "titans_mac": 832,
    "titans_mag": {"ffn_hidden": 448, "attention_window": 1024},
    "titans_mal": {"ffn_hidden": 448, "attention_window": 1024},
    "dla": 896,
    "memora": 896,
    "ttt_linear": 1344,
    "ttt_mlp": 1088,
    "hope": (224, 224, 448),
    "hope_attention": (352, 352, 704),
    "retnet": 768,
    "deltanet": 1408,
    "gated_deltanet": 1088,
    "comba": 1088,
    "mamba2": {"ffn_hidden": 0, "num_layers": 30},
    "mamba": {"ffn_hidden": 0, "num_layers": 31},
    "samba": {"ffn_hidden": 1216, "attention_window": 1024},
    "rwkv7": 1920,
    "lstm": 768,
    "srwm": 1792,
  },
  "340m": {
    "shape": {"width": 1024, "num_layers": 24, "num_heads": 8},
    "transformer": 2816,
    "titans": 2304,
    "titans_mac": 1664,
    "titans_mag": {"ffn_hidden": 1024, "attention_window": 2048},
    "titans_mal": {"ffn_hidden": 1024, "attention_window": 2048},
    "dla": 2048,
    "memora": 2048,
    "ttt_linear": 2688,
    "ttt_mlp": 2432,
    "hope": (512, 512, 1024),
    "hope_attention": (768, 768, 1280),
    "retnet": 1408,
    "deltanet": 2816,
    "gated_deltanet": 2048,
    "comba": 2048,
    "mamba2": {"ffn_hidden": 0, "num_layers": 47},
    "mamba": {"ffn_hidden": 0, "num_layers": 46},
    "samba": {"ffn_hidden": 2304, "attention_window": 2048},
    "rwkv7": 3840,
    "lstm": 1408,
    "srwm": 3712,
  },
  "760m": {
    "shape": {"width": 1536, "num_layers": 24, "num_heads": 12},
    "transformer": 4352,
    "titans": 3712,
    "titans_mac": 2688,
    "titans_mag": {"ffn_hidden": 1664, "attention_window": 2048},
    "titans_mal": {"ffn_hidden": 1664, "attention_window": 2048},
    "dla": 3456,
    "memora": 3456,
    "ttt_linear": 4352,
    "ttt_mlp": 3968,
    "hope": (896, 896, 1664),
    "hope_attention": (1024, 1024, 2304),
    "retnet": 2304,
    "deltanet": 4352,
    "gated_deltanet": 3328,
    "comba": 3328,
    "mamba2": {"ffn_hidden": 0, "num_layers": 48},
    "mamba": {"ffn_hidden": 0, "num_layers": 48},
    "samba": {"ffn_hidden": 3840, "attention_window": 2048},
    "rwkv7": 6144,
    "lstm": 2304,
    "srwm": 5760,
  },
  "1p3b": {
    "shape": {"width": 2048, "num_layers": 24, "num_heads": 16},
    "transformer": 5632,
    "titans": 4864,
    "titans_mac": 3456,
    "titans_mag": {"ffn_hidden": 2048, "attention_window": 2048},
    "titans_mal": {"ffn_hidden": 2176, "attention_window": 2048},
    "dla": 4608,
    "memora": 4608,
    "ttt_linear": 5632,
    "ttt_mlp": 5248,
    "hope": (1152, 1152, 2304),
    "hope_attention": (1408, 1408, 2816),
    "retnet": 2944,
    "deltanet": 5632,
    "gated_deltanet": 4224,
    "comba": 4224,
    "mamba2": {"ffn_hidden": 0, "num_layers": 48},
    "mamba": {"ffn_hidden": 0, "num_layers": 48},
    "samba": {"ffn_hidden": 4992, "attention_window": 2048},
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
WITHOUT_MOMENTUM = {
  "adaptive": (),
  "target": "shared",
  "delta_rule": "none",
  "momentum": "none",
  "activation": "gelu",
}
# Gradient descent as published: M_t = alpha M_{t-1} - eta grad.  DLA's errors
# are clipped nevertheless: those of its hidden layer grow with its output
# layer, which, untrained, grew 2e17-fold in 8,192 tokens; clipped, 200-fold.
PLAIN = {**WITHOUT_MOMENTUM, "proximal": False, "step_scale": "sum"}
TITANS = {"adaptive": (), "target": "shared", "delta_rule": "none"}
MEMORIES = {
  "titans": TITANS,
  "titans_mac": {**TITANS, "read": "token_post"},
  "titans_mag": TITANS,
  "titans_mal": TITANS,
  "hope": {
    "adaptive": ("k", "v", "eta", "alpha"),
    "target": "self",
    "setting": "token_exact",
    "delta_rule": "proximal",
    "initial_learn_rate": 4.0,
  },
  "dla": {**PLAIN, "setting": "chunk_dot"},
  "memora": {
    **PLAIN,
    "error_clip": 0.0,
    "read": "chunk",  # reads per token are twelve times as slow
  },
  "ttt_linear": {"adaptive": (), "initial_learn_rate": 1.0},
  "ttt_mlp": {"adaptive": (), "initial_learn_rate": 0.1},
}
# As in their authors' code; every other model uses `normal`.
INITIALIZERS = {
  **dict.fromkeys(("mamba", "mamba2", "samba"), "uniform"),
  "gated_deltanet": "small",
}
SEGMENT = 4
# Hidden widths of these memories, in head widths.
EXPANSION = {"dla": 4, "memora": 4, "ttt_mlp": 4}
MINI_BATCH: dict[str, int] = dict.fromkeys(
  ("memora", "ttt_linear", "ttt_mlp"), 16
)


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
  projections; `cms_chunks`: tokens between updates of each CMS level (0:
  never); `cms_signal`: what the levels learn from; `fields` override the rest.
  """
  sequence_layer = name.removesuffix("_conv")
  row = SIZES[size]
  shape = row["shape"]
  head_dim = shape["width"] // shape["num_heads"]
  group = {
    "sequence_layer": sequence_layer,
    "conv_window": 0 if name in WITHOUT_CONVOLUTION else 4,
    "initializer": INITIALIZERS.get(name, "normal"),
    "memory": {
      "chunk_length": MINI_BATCH.get(name, memory_chunks[0]),
      "projection_chunk_length": memory_chunks[1],
      "hidden": EXPANSION.get(name, 0) * head_dim,
      **MEMORIES.get(name, {}),
    },
    **shape,
  }
  if name == "titans_mac":  # attention works inside a chunk
    group["memory"]["chunk_length"] *= SEGMENT
  if name in ("titans_mac", "titans_mag"):
    group["persistent_tokens"] = 16
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
  return {**group, "ffn_hidden": sum(hidden), **fields}  # CMS replaces the FFN
