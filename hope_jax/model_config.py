"""The model group of the configuration: memories, CMS, blocks (`config.py`).

The paper's symbols become words here:

  learn_rate = eta, retention = alpha, momentum_decay = beta (spec: the inner
  rule), half life = log(1/2) / log(alpha) in tokens.
"""

import dataclasses
import itertools
from typing import Literal

from hope_jax.fields import ConfigError, check_choice, check_numbers

EXACT_SETTINGS = "token_exact", "negative_eigenvalues"


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """One learning rule for fast weights (paper section 8, eq. 83-90).

  Attributes:
    architecture: `mlp` is M(x) = x + W1 act(W2 x) (eq. 89), `matrix` W x.
    hidden: hidden width of the MLP per head; 0 means the head width.
    adaptive: which projections are memories themselves (Hope); none: Titans.
    target: `self`: vhat = M(v) (eq. 87); `shared`: v.
    setting: `chunk_l2` takes an L2 gradient at the chunk's first state (B);
      `chunk_dot` one of the dot product -<M(k), vhat>;
      `token_exact` a dot-product objective on the residual target, exact
      inside the chunk (A; the output layer and the memory box only);
      `negative_eigenvalues` is A with steps up to 2, so that one token can
      turn around what is stored (parity).
    delta_rule: `proximal` erases with alpha eta', `literal` with eta',
      `none` does not erase (Titans).
    momentum: `averaged` scales the step by 1 - beta, `sum` is literal.
    retention: forgetting returns to the learned start (`start`), to zero
      (`zero`, literal eq. 88), or does not happen (`none`).
    step_scale: `mean` divides step and erase by the chunk length.
    proximal: step eta' = eta / (1 + eta |x|^2); off: eta' = eta.
    loss_factor: inner loss is loss_factor |M(k) - vhat|^2.
    error_clip: largest norm of a layer's error; 0 does not clip.
    target_clip: the same for M_0(k) - vhat in the exact settings; without it a
      self-generated vhat, which D is part of, may grow from chunk to chunk.
    chunk_length, projection_chunk_length: tokens per chunk of the memory and
      of the adaptive projections.
    remat: saved states of the backward pass: `none`, `chunk` or `sqrt`.
    implementation: of whole chunks, `xla` or kernels, `pallas_tpu` or (linear
      layers only) `pallas_gpu`; `auto` takes the kernels where they run.
      `pallas_interpret`: the TPU's on any machine, slowly, for tests.  Parts of
      chunks are always XLA's.
  """

  architecture: str = "mlp"
  hidden: int = 0
  activation: str = "silu"
  adaptive: tuple[str, ...] = ("k", "v", "eta", "alpha")
  target: str = "self"
  setting: str = "chunk_l2"
  delta_rule: str = "proximal"
  momentum: str = "averaged"
  retention: str = "start"
  step_scale: str = "mean"
  proximal: bool = True
  loss_factor: float = 0.5
  error_clip: float = 1.0
  target_clip: float = 4.0
  read: str = "token_pre"
  chunk_length: int = 64
  projection_chunk_length: int = 256
  half_life_min: float = 64.0
  half_life_max: float = 16384.0
  initial_learn_rate: float = 0.7
  initial_momentum: float = 0.88
  remat: Literal["none", "chunk", "sqrt"] = "sqrt"
  implementation: str = "auto"

  def __post_init__(self):
    check_choice(
      self.implementation, "memory.implementation", ("auto", "xla", *KERNELS)
    )
    check_choice(self.architecture, "memory.architecture", ("mlp", "matrix"))
    check_choice(self.activation, "memory.activation", ("silu", "gelu"))
    for box in self.adaptive:
      check_choice(box, "memory.adaptive", ("k", "v", "q", "eta", "alpha"))
    check_choice(self.target, "memory.target", ("self", "shared"))
    settings = "chunk_l2", "chunk_dot", *EXACT_SETTINGS
    check_choice(self.setting, "memory.setting", settings)
    check_choice(
      self.delta_rule, "memory.delta_rule", ("proximal", "literal", "none")
    )
    check_choice(self.momentum, "memory.momentum", ("none", "averaged", "sum"))
    check_choice(self.retention, "memory.retention", ("start", "zero", "none"))
    check_choice(self.step_scale, "memory.step_scale", ("mean", "sum"))
    check_choice(self.read, "memory.read", ("chunk", "token_pre", "token_post"))
    check_choice(self.remat, "memory.remat", ("none", "chunk", "sqrt"))
    lengths = "chunk_length", "projection_chunk_length"
    half_lives = "half_life_min", "half_life_max"
    rates = "initial_learn_rate", "initial_momentum"
    positive = (*lengths, *half_lives, *rates, "loss_factor")
    check_numbers(self, "memory", positive, ("initial_momentum",))
    if self.half_life_min > self.half_life_max:
      raise ConfigError(
        f"memory.half_life_min={self.half_life_min} must not be above"
        f" memory.half_life_max={self.half_life_max}"
      )
    if self.setting == "negative_eigenvalues":
      if self.read == "chunk" or self.delta_rule == "none":
        raise ConfigError(
          "memory.setting=negative_eigenvalues needs a token's erase before"
          " the next one's read: memory.read=token_pre or token_post, and a"
          f" memory.delta_rule; got {self.read} and {self.delta_rule}"
        )
      if self.initial_learn_rate >= 2:
        raise ConfigError(
          f"memory.initial_learn_rate={self.initial_learn_rate} must be below 2"
          " with memory.setting=negative_eigenvalues"
        )

  @property
  def is_exact(self) -> bool:
    """Whether the output layer learns by setting A, exact in the chunk."""
    return self.setting in EXACT_SETTINGS


@dataclasses.dataclass(frozen=True)
class CMSConfig:
  """Continuum memory system (paper section 7): k blocks split the FFN.

  Attributes:
    hidden: hidden width per level, fastest first; empty: as connection=none.
    chunk_lengths: tokens between updates of a level; 0 never (the last).
    step_tokens: tokens of a training step (batch size x sequence length).  A
      level whose chunk has at least so many is the optimizer's: slow inside a
      sequence, its gradients are summed over chunk / step_tokens steps.  0:
      there is none.
    connection: `sequential`, `nested` or `independent`, see `models/cms.py`;
      `none`: a plain FFN of model.ffn_hidden instead.
    signal: `associative` (a level answers a value) or `next_token` (it follows
      the gradient of the model's loss, `models/next_token.py`).
    value: wiring of the associative signal, see `models/cms.py`.
    learning_share: share of the layers, from the last one down, that learn by
      the next-token signal.
    outer_order: 2 differentiates through the next-token signal's gradient, 1
      takes it for a constant.
    half_life: tokens after which half of D is forgotten, where it starts
      (learned per level); 0: nothing is forgotten.
  """

  hidden: tuple[int, ...] = ()
  chunk_lengths: tuple[int, ...] = ()
  step_tokens: int = 0
  connection: str = "sequential"
  signal: str = "associative"
  value: str = "mixer_pair"
  learning_share: float = 0.25
  outer_order: int = 2
  half_life: float = 0.0
  initial_learn_rate: float = 0.1
  error_clip: float = 1.0

  def __post_init__(self):
    if len(self.hidden) != len(self.chunk_lengths):
      raise ConfigError(
        f"cms.hidden has {len(self.hidden)} levels and cms.chunk_lengths"
        f" {len(self.chunk_lengths)}: give one chunk length per level"
      )
    fast = [c for c in self.chunk_lengths if c]
    if fast != sorted(fast) or any(self.chunk_lengths[len(fast) :]):
      raise ConfigError(
        "cms.chunk_lengths must grow from level to level, 0 (never) last;"
        f" got {self.chunk_lengths}"
      )
    positive = "hidden", "initial_learn_rate", "learning_share"
    check_numbers(self, "cms", positive)
    connections = "sequential", "nested", "independent", "none"
    check_choice(self.connection, "cms.connection", connections)
    wirings = "mixer_linear", "mixer_value", "mixer_pair"
    check_choice(self.value, "cms.value", wirings)
    check_choice(self.signal, "cms.signal", ("associative", "next_token"))
    if self.outer_order not in (1, 2):
      raise ConfigError(f"cms.outer_order={self.outer_order} must be 1 or 2")
    if self.learning_share > 1:
      raise ConfigError(
        f"cms.learning_share={self.learning_share} must not be above 1"
      )
    self._check_steps()
    self._check_lengths([c for c in fast if not self._is_of_steps(c)])

  def _check_steps(self):
    lengths = [c for c in self.chunk_lengths if self._is_of_steps(c)]
    for length in lengths:
      if length % self.step_tokens:
        raise ConfigError(
          f"cms.chunk_lengths: {length} is not a multiple of"
          f" cms.step_tokens={self.step_tokens}: such a level changes after"
          " whole training steps"
        )
    if lengths and self.connection == "nested":
      raise ConfigError(
        f"cms.chunk_lengths: {lengths[0]} is not below"
        f" cms.step_tokens={self.step_tokens}: cms.connection=nested has one"
        " block for all levels, which cannot change seldom for one of them"
      )

  def _check_lengths(self, fast: list[int]):
    together = self.connection == "nested" or self.signal == "next_token"
    for faster, slower in itertools.pairwise(fast if together else []):
      if slower % faster:
        raise ConfigError(
          f"cms.chunk_lengths: {faster} does not divide {slower}, which"
          f" cms.connection={self.connection} with signal={self.signal} needs"
        )
    if self.signal == "next_token" and (not fast or fast[0] & (fast[0] - 1)):
      raise ConfigError(
        "cms.signal=next_token: the shortest of cms.chunk_lengths must be a"
        f" power of two; got {self.chunk_lengths}"
      )

  @property
  def levels(self) -> int:
    """Number of levels, fast and slow; 0: a plain FFN."""
    return 0 if self.connection == "none" else len(self.hidden)

  @property
  def fast_lengths(self) -> tuple[int, ...]:
    """Chunk lengths of the levels that learn inside the sequence."""
    lengths = self.chunk_lengths if self.levels else ()
    return tuple(c for c in lengths if c and not self._is_of_steps(c))

  @property
  def periods(self) -> dict[int, int]:
    """Training steps between updates of a level, by its number, of all levels
    whose chunk has whole steps."""
    return {
      level: length // self.step_tokens
      for level, length in enumerate(self.chunk_lengths)
      if self.levels and self._is_of_steps(length)
    }

  def without_periods(self) -> "CMSConfig":
    """The same where nothing is trained: levels of `periods` never change."""
    lengths = (0 if self._is_of_steps(c) else c for c in self.chunk_lengths)
    return dataclasses.replace(
      self, chunk_lengths=tuple(lengths), step_tokens=0
    )

  def _is_of_steps(self, length: int) -> bool:
    """Whether a chunk has at least as many tokens as a training step."""
    return 0 < self.step_tokens <= length


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's stretch of rotary positions to longer contexts.

  A frequency f turns r = original_context_length f / 2 pi times in the context
  that it was trained for.  It becomes f / factor where r is below
  low_frequency_factor and stays f above high_frequency_factor; in between it
  goes over linearly in r.  factor 1: off.
  """

  factor: float = 1.0
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  original_context_length: int = 8192

  def __post_init__(self):
    names = tuple(field.name for field in dataclasses.fields(self))
    check_numbers(self, "model.rope_scaling", names)
    if self.low_frequency_factor >= self.high_frequency_factor:
      raise ConfigError(
        "model.rope_scaling.low_frequency_factor="
        f"{self.low_frequency_factor} must be below high_frequency_factor="
        f"{self.high_frequency_factor}"
      )


# Sequence layers by what they remember with.
ATTENTION_LAYERS = ("transformer", "hope_attention")
TITANS_VARIANTS = ("titans_mac", "titans_mag", "titans_mal")
MEMORY_LAYERS = ("titans", *TITANS_VARIANTS, "hope", "dla", "memora")
TTT_LAYERS = ("ttt_linear", "ttt_mlp")
MEMORA_RULE = {
  "architecture": "mlp",
  "adaptive": (),
  "target": "shared",
  "delta_rule": "none",
  "momentum": "none",
}
LINEAR_LAYERS = "retnet", "deltanet", "gated_deltanet", "comba", "mamba2"
FUSED_LAYERS = "titans", "titans_mag", "titans_mal", "hope", "dla"
KERNELS = {  # memory.implementation -> layers that have kernels of it
  "pallas_tpu": FUSED_LAYERS + LINEAR_LAYERS,
  "pallas_gpu": LINEAR_LAYERS,
  "pallas_interpret": FUSED_LAYERS + LINEAR_LAYERS,
}
STATE_SPACE_LAYERS = ("mamba",)
RECURRENT_LAYERS = "rwkv7", "lstm", "srwm"
# Models whose blocks take turns: the sequence layers of one after the other.
PATTERNS = {"samba": ("mamba", "transformer")}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A language model: `sequence_layer` + FFN (or CMS) blocks.

  Attributes:
    inner_rates: `off` makes the twin: the same model, no inner learning.
    num_kv_heads: heads of attention's keys and values, each shared by a group
      of num_heads / num_kv_heads query heads; 0: num_heads.
    ffn_hidden: hidden width of the FFN; 0: blocks have none.
    frozen_levels: fast levels whose writes are switched off (`memory`, `k`,
      `v`, `q`, `eta`, `alpha`, `cms_0`, `cms_1` ...).
    num_layers: blocks; those of a pattern (`samba`) are counted one by one.
    conv_window: of the causal convolution on q, k and v; 0: none.
    attention_window: tokens that a token's attention sees, itself included; 0:
      all before it.
    persistent_tokens: learned keys and values that every token's attention sees
      beside its window (Titans MAG, MAC).
    context_length: positions of attention's cache when generating; with a
      window it has as many as that, and sequences may be of any length.
    norm_eps: added to the mean square in norms with a learned scale.
    initializer: how linear maps begin, `layers.initializer`.
    tied_embeddings: logits are read with the embedding; off: with a matrix of
      their own.
    remat: what the outer backward pass keeps of a block.
  """

  sequence_layer: str = "transformer"
  vocab_size: int = 256
  width: int = 128
  num_layers: int = 4
  num_heads: int = 2
  num_kv_heads: int = 0
  ffn_hidden: int = 448
  conv_window: int = 4
  attention_window: int = 0
  persistent_tokens: int = 0
  context_length: int = 4096
  rope_base: float = 10000.0
  rope_scaling: RopeScaling = RopeScaling()
  norm_eps: float = 1e-6
  initializer: str = "normal"
  tied_embeddings: bool = True
  memory: MemoryConfig = MemoryConfig()
  cms: CMSConfig = CMSConfig()
  inner_rates: str = "on"
  frozen_levels: tuple[str, ...] = ()
  dtype: str = "float32"
  remat: str = "none"

  def __post_init__(self):
    known = ATTENTION_LAYERS + MEMORY_LAYERS + TTT_LAYERS + LINEAR_LAYERS
    known += STATE_SPACE_LAYERS + RECURRENT_LAYERS + tuple(PATTERNS)
    check_choice(self.sequence_layer, "model.sequence_layer", known)
    check_choice(self.inner_rates, "model.inner_rates", ("on", "off"))
    starts = "normal", "uniform", "small"
    check_choice(self.initializer, "model.initializer", starts)
    check_choice(self.dtype, "model.dtype", ("float32", "bfloat16"))
    check_choice(self.remat, "model.remat", ("none", "full", "dots"))
    sizes = "vocab_size", "width", "num_layers", "num_heads"
    positive = (*sizes, "context_length", "rope_base", "norm_eps")
    check_numbers(self, "model", positive)
    if self.conv_window == 1:
      raise ConfigError("model.conv_window=1 mixes nothing: 0 (none) or >= 2")
    if self.width % self.num_heads:
      raise ConfigError(
        f"model.num_heads={self.num_heads} does not divide"
        f" model.width={self.width}"
      )
    if self.num_layers % len(self.pattern):
      raise ConfigError(
        f"model.num_layers={self.num_layers} is not a multiple of"
        f" {len(self.pattern)}: {self.sequence_layer} has"
        f" {' and '.join(self.pattern)} blocks in turn"
      )
    rotary = (*TITANS_VARIANTS, *TTT_LAYERS, "retnet")
    has_positions = self.has_attention or self.sequence_layer in rotary
    if has_positions and self.head_dim % 2:
      raise ConfigError(
        f"model.width={self.width} and num_heads={self.num_heads} make heads of"
        f" {self.head_dim}: rotary positions need an even width"
      )
    if self.is_rwkv7 and self.width > 64 and self.width % 64:
      raise ConfigError(
        f"model.width={self.width}: RWKV-7's heads of 64 do not divide it"
      )
    self._check_attention()
    has_pairs = not self.is_linear and (
      self.sequence_layer not in RECURRENT_LAYERS
    )
    if self.cms.fast_lengths and not has_pairs:
      raise ConfigError(
        f"model.sequence_layer={self.sequence_layer} has no keys and values of"
        " the model's width for a CMS: leave cms.hidden empty"
      )
    self._check_memory()
    names = self.fast_levels
    for level in self.frozen_levels:
      if level not in names:
        raise ConfigError(
          f"level {level!r} does not exist in this model; it has"
          f" {', '.join(names) or 'no fast levels'}"
        )

  def _check_memory(self):
    layer, memory = self.sequence_layer, self.memory
    has_window = layer in ("titans_mag", "titans_mal")
    if has_window and not self.attention_window:
      raise ConfigError(
        f"model.attention_window=0: {layer}'s attention needs a window"
      )
    if self.persistent_tokens and layer not in ("titans_mac", "titans_mag"):
      raise ConfigError(
        f"model.persistent_tokens={self.persistent_tokens} are for titans_mac"
        f" and titans_mag, not for {layer}: leave it at 0"
      )
    if layer == "titans_mac" and memory.adaptive:
      raise ConfigError(
        f"memory.adaptive={memory.adaptive}: titans_mac has slow projections"
      )
    if layer not in KERNELS.get(memory.implementation, (layer,)):
      raise ConfigError(
        f"memory.implementation={memory.implementation}: {layer} has no such"
        " kernel, take xla"
      )
    needed = MEMORA_RULE if layer == "memora" else {}
    for field, value in needed.items():
      if (found := getattr(memory, field)) != value:
        raise ConfigError(
          f"memory.{field}={found}: model.sequence_layer=memora needs {value}"
        )
    if layer == "memora" and memory.is_exact:
      raise ConfigError(
        f"memory.setting={memory.setting}: model.sequence_layer=memora learns"
        " by gradients at the chunk's first state (chunk_l2)"
      )

  def _check_attention(self):
    if self.num_kv_heads and self.num_heads % self.num_kv_heads:
      raise ConfigError(
        f"model.num_kv_heads={self.num_kv_heads} does not divide"
        f" model.num_heads={self.num_heads}"
      )
    for name, is_on in (
      ("num_kv_heads", self.num_kv_heads != 0),
      ("rope_scaling.factor", self.rope_scaling.factor != 1),
    ):
      if is_on and not self.has_attention:
        raise ConfigError(
          f"model.{name} is for attention, which model.sequence_layer="
          f"{self.sequence_layer} does not have: leave it at its default"
        )

  @property
  def head_dim(self) -> int:
    return self.width // self.num_heads

  @property
  def kv_heads(self) -> int:
    """Heads of attention's keys and values."""
    return self.num_kv_heads or self.num_heads

  @property
  def pattern(self) -> tuple[str, ...]:
    """Sequence layers of the blocks that take turns, or of all blocks."""
    return PATTERNS.get(self.sequence_layer, (self.sequence_layer,))

  @property
  def has_attention(self) -> bool:
    return any(name in ATTENTION_LAYERS for name in self.pattern)

  @property
  def has_longest_context(self) -> bool:
    """Whether a sequence may have `context_length` tokens and no more."""
    return self.has_attention and not self.attention_window

  @property
  def attends(self) -> bool:
    """Whether it has attention, be it beside a memory."""
    return self.has_attention or self.sequence_layer in TITANS_VARIANTS

  @property
  def is_linear(self) -> bool:
    """Whether it has a linear recurrence (`models/linear.py`, `mamba.py`)."""
    recurrent = LINEAR_LAYERS + STATE_SPACE_LAYERS
    return any(name in recurrent for name in self.pattern)

  @property
  def is_rwkv7(self) -> bool:
    """Whether it has RWKV-7's block (`models/rwkv7.py`)."""
    return self.sequence_layer == "rwkv7"

  @property
  def memory_chunks(self) -> tuple[int, ...]:
    """Chunk lengths at whose multiples a document has to begin."""
    if self.sequence_layer not in MEMORY_LAYERS + TTT_LAYERS:
      return ()
    memory = self.memory
    if memory.adaptive and self.sequence_layer in MEMORY_LAYERS:
      return memory.chunk_length, memory.projection_chunk_length
    return (memory.chunk_length,)

  @property
  def fast_levels(self) -> tuple[str, ...]:
    """Names of everything that learns inside the sequence, fastest first."""
    levels = ()
    if self.sequence_layer in MEMORY_LAYERS:
      levels += ("memory", *self.memory.adaptive)
    if self.sequence_layer in (*TTT_LAYERS, "srwm"):
      levels += ("memory",)
    fast = len(self.cms.fast_lengths)
    return levels + tuple(f"cms_{i}" for i in range(fast))

  def is_live(self, level: str) -> bool:
    """Whether `level` is written to inside the sequence."""
    return self.inner_rates == "on" and level not in self.frozen_levels
