"""The model group of the configuration: memories, CMS, blocks.

The paper's symbols become words here (docs/equations.md):

  learn_rate = eta, retention = alpha, momentum_decay = beta;
  half life = log(1/2) / log(alpha) in tokens.
"""

import dataclasses
import itertools
from typing import Literal

from hope_jax.config.fields import ConfigError, check, check_choice
from hope_jax.config.layers import LAYERS, Traits

EXACT_SETTINGS = "token_exact", "negative_eigenvalues"
Setting = Literal[
  "chunk_l2", "chunk_dot", "token_exact", "negative_eigenvalues"
]
Box = Literal["k", "v", "q", "eta", "alpha"]


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """One learning rule for fast weights (paper section 8, eq. 83-90).

  Attributes:
    architecture: `mlp` is M(x) = x + W1 act(W2 x) (eq. 89), `matrix` W x.
    hidden: hidden width of the MLP per head; 0 means the head width.
    adaptive: which projections are memories themselves (Hope); none: Titans.
    target: `self`: vhat = M(v) (eq. 87); `shared`: v.
    setting: `chunk_l2` takes the gradient of an L2 objective at the chunk's
      first state (setting B); `chunk_dot` takes that of -<M(k), vhat>;
      `token_exact` is a dot-product objective on the residual target, exact
      inside the chunk (setting A; only for the output layer of the memory that
      is read, not for the adaptive projections); `negative_eigenvalues` is A
      with steps up to 2, so that one token can reverse the sign of what is
      stored (parity).
    delta_rule: `proximal` erases with alpha eta', `literal` with eta',
      `none` does not erase (Titans).
    momentum: `averaged` scales the step by 1 - beta, `sum` does not (literal).
    retention: forgetting returns to the learned start (`start`), to zero
      (`zero`, literal eq. 88), or does not happen (`none`).
    step_scale: `mean` divides step and erase by the chunk length, except where
      setting A applies.
    proximal: step eta' = eta / (1 + eta |x|^2); off: eta' = eta.  Setting A
      with `negative_eigenvalues` has its own step (`memory/rules.py`).
    loss_factor: the inner loss is loss_factor |M(k) - vhat|^2.
    error_clip: largest norm of a layer's error; 0 does not clip.
    target_clip: the same bound for M_0(k) - vhat in the exact settings.
      Without it, a self-generated vhat, which depends on D, may grow from chunk
      to chunk.
    chunk_length, projection_chunk_length: tokens per chunk of the memory and
      of the adaptive projections.
    remat: rematerialization in the backward pass: `none`, `chunk` or `sqrt`.
    implementation: backend of whole chunks: `xla`, or the kernels `pallas_tpu`
      or (linear layers only) `pallas_gpu`; `auto` takes the kernels where they
      run.  `pallas_interpret` runs the TPU kernels on any machine, slowly, for
      tests.  Partial chunks always use XLA.
  """

  architecture: Literal["mlp", "matrix"] = "mlp"
  hidden: int = 0
  activation: Literal["silu", "gelu"] = "silu"
  adaptive: tuple[Box, ...] = ("k", "v", "eta", "alpha")
  target: Literal["self", "shared"] = "self"
  setting: Setting = "chunk_l2"
  delta_rule: Literal["proximal", "literal", "none"] = "proximal"
  momentum: Literal["none", "averaged", "sum"] = "averaged"
  retention: Literal["start", "zero", "none"] = "start"
  step_scale: Literal["mean", "sum"] = "mean"
  proximal: bool = True
  loss_factor: float = 0.5
  error_clip: float = 1.0
  target_clip: float = 4.0
  read: Literal["chunk", "token_pre", "token_post"] = "token_pre"
  chunk_length: int = 64
  projection_chunk_length: int = 256
  half_life_min: float = 64.0
  half_life_max: float = 16384.0
  initial_learn_rate: float = 0.7
  initial_momentum: float = 0.88
  remat: Literal["none", "chunk", "sqrt"] = "sqrt"
  implementation: Literal[
    "auto", "xla", "pallas_tpu", "pallas_gpu", "pallas_interpret"
  ] = "auto"

  def __post_init__(self):
    lengths = "chunk_length", "projection_chunk_length"
    half_lives = "half_life_min", "half_life_max"
    rates = "initial_learn_rate", "initial_momentum"
    positive = (*lengths, *half_lives, *rates, "loss_factor")
    check(self, "memory", positive, ("initial_momentum",))
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
    """Whether the output layer learns by setting A, exact inside a chunk."""
    return self.setting in EXACT_SETTINGS


@dataclasses.dataclass(frozen=True)
class CMSConfig:
  """Continuum memory system (paper section 7): k blocks split the FFN.

  Attributes:
    hidden: hidden width per level, fastest first; empty: no levels, as with
      connection=none.
    chunk_lengths: tokens between the updates of each level; 0 (only for the
      last levels): never updated.
    step_tokens: tokens of a training step (batch size x sequence length).  A
      level with chunks at least this long belongs to the optimizer: it is slow
      inside a sequence, and is updated every chunk / step_tokens steps from the
      mean of their gradients.  0: there is no such level.
    connection: `sequential`, `nested` or `independent`, see `models/cms.py`;
      `none`: a plain FFN of model.ffn_hidden instead.
    signal: `associative` (a level learns to return a value) or `next_token` (it
      follows the gradient of the model's loss, `models/next_token.py`).
    value: wiring of the associative signal, see `models/cms.py`.
    learning_share: share of the layers, counted from the last one, that learn
      by the next-token signal.
    outer_order: 2 differentiates through the next-token signal's gradient, 1
      treats it as a constant.
    half_life: initial half-life of D in tokens (learned per level); 0: nothing
      is forgotten.
  """

  hidden: tuple[int, ...] = ()
  chunk_lengths: tuple[int, ...] = ()
  step_tokens: int = 0
  connection: Literal["sequential", "nested", "independent", "none"] = (
    "sequential"
  )
  signal: Literal["associative", "next_token"] = "associative"
  value: Literal["mixer_linear", "mixer_value", "mixer_pair"] = "mixer_pair"
  learning_share: float = 0.25
  outer_order: Literal[1, 2] = 2
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
    check(self, "cms", positive)
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
  def periods(self) -> dict[str, int]:
    """Training steps between updates, by level name, for the levels that the
    optimizer updates (`step_tokens`)."""
    return {
      f"cms_{level}": length // self.step_tokens
      for level, length in enumerate(self.chunk_lengths)
      if self.levels and self._is_of_steps(length)
    }

  def without_periods(self) -> "CMSConfig":
    """The same without training: the levels of `periods` never change."""
    lengths = (0 if self._is_of_steps(c) else c for c in self.chunk_lengths)
    return dataclasses.replace(
      self, chunk_lengths=tuple(lengths), step_tokens=0
    )

  def _is_of_steps(self, length: int) -> bool:
    """Whether a chunk has at least as many tokens as a training step."""
    return 0 < self.step_tokens <= length


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's scaling of rotary frequencies for longer contexts.

  A frequency f makes r = original_context_length f / 2 pi turns in the context
  that the model was trained for.  It becomes f / factor where r is below
  low_frequency_factor and stays f where r is above high_frequency_factor; in
  between, it is interpolated linearly in r.  factor 1: off.
  """

  factor: float = 1.0
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  original_context_length: int = 8192

  def __post_init__(self):
    names = tuple(field.name for field in dataclasses.fields(self))
    check(self, "model.rope_scaling", names)
    if self.low_frequency_factor >= self.high_frequency_factor:
      raise ConfigError(
        "model.rope_scaling.low_frequency_factor="
        f"{self.low_frequency_factor} must be below high_frequency_factor="
        f"{self.high_frequency_factor}"
      )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A language model: `sequence_layer` + FFN (or CMS) blocks.

  Attributes:
    inner_rates: `off` gives the twin, the same model without inner learning.
    num_kv_heads: heads of attention's keys and values, each shared by a group
      of num_heads / num_kv_heads query heads; 0: num_heads.
    ffn_hidden: hidden width of the FFN; 0: blocks have no FFN.
    frozen_levels: fast levels whose writes are switched off (`memory`, `k`,
      `v`, `q`, `eta`, `alpha`, `cms_0`, `cms_1` ...).
    num_layers: number of blocks; in a pattern (`samba`), every block counts.
    conv_window: width in tokens of the causal convolution on q, k and v; 0: no
      convolution.
    attention_window: number of tokens that a token attends to, itself included;
      0: itself and all before it.
    persistent_tokens: number of learned keys and values that every token
      attends to in addition to its window (Titans MAG, MAC).
    context_length: positions in attention's cache, which bound the length of a
      sequence that is read in parts or generated.  With attention_window, the
      cache has the window's size and sequences may be of any length.
    norm_eps: added to the mean square in norms with a learned scale.
    initializer: initial values of linear maps (`layers.initializer`).  The
      embedding, the CMS levels and MAC's maps of the memory always use
      `normal`.
    tied_embeddings: the logits use the embedding matrix; off: they have a
      matrix of their own.
    remat: rematerialization of blocks in the outer backward pass: `none`, all
      (`full`), or all but matrix products (`dots`).
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
  initializer: Literal["normal", "uniform", "small"] = "normal"
  tied_embeddings: bool = True
  memory: MemoryConfig = MemoryConfig()
  cms: CMSConfig = CMSConfig()
  inner_rates: Literal["on", "off"] = "on"
  frozen_levels: tuple[str, ...] = ()
  dtype: Literal["float32", "bfloat16"] = "float32"
  remat: Literal["none", "full", "dots"] = "none"

  def __post_init__(self):
    check_choice(self.sequence_layer, "model.sequence_layer", tuple(LAYERS))
    sizes = "vocab_size", "width", "num_layers", "num_heads"
    positive = (*sizes, "context_length", "rope_base", "norm_eps")
    check(self, "model", positive)
    if self.conv_window == 1:
      raise ConfigError("model.conv_window=1 mixes nothing: 0 (none) or >= 2")
    self._check_shape()
    self._check_attention()
    self._check_memory()
    names = self.fast_levels
    for level in self.frozen_levels:
      if level not in names:
        raise ConfigError(
          f"level {level!r} does not exist in this model; it has"
          f" {', '.join(names) or 'no fast levels'}"
        )

  def _check_shape(self):
    if self.width % self.num_heads:
      raise ConfigError(
        f"model.num_heads={self.num_heads} does not divide"
        f" model.width={self.width}"
      )
    if self.num_layers % len(self.blocks):
      raise ConfigError(
        f"model.num_layers={self.num_layers} is not a multiple of"
        f" {len(self.blocks)}: {self.sequence_layer} has"
        f" {' and '.join(self.blocks)} blocks in turn"
      )
    if self.traits.rotary and self.head_dim % 2:
      raise ConfigError(
        f"model.width={self.width} and num_heads={self.num_heads} make heads of"
        f" {self.head_dim}: rotary positions need an even width"
      )
    head_dim = self.traits.head_dim
    if head_dim and self.width > head_dim and self.width % head_dim:
      raise ConfigError(
        f"model.width={self.width}: {self.sequence_layer}'s heads of"
        f" {head_dim} do not divide it"
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
    if self.traits.needs_window and not self.attention_window:
      raise ConfigError(
        f"model.attention_window=0: {self.sequence_layer}'s attention needs a"
        " window"
      )
    if self.persistent_tokens and not self.traits.persistent:
      may = [name for name, traits in LAYERS.items() if traits.persistent]
      raise ConfigError(
        f"model.persistent_tokens={self.persistent_tokens} are for"
        f" {' and '.join(may)}, not for {self.sequence_layer}: leave it at 0"
      )

  def _check_memory(self):
    if self.cms.fast_lengths and not self.traits.pairs:
      raise ConfigError(
        f"model.sequence_layer={self.sequence_layer} has no keys and values of"
        " the model's width for a CMS: leave cms.hidden empty"
      )
    name = self.memory.implementation
    if name not in ("auto", "xla", *self.traits.kernels):
      raise ConfigError(
        f"memory.implementation={name}: {self.sequence_layer} has no such"
        " kernel, take xla"
      )
    for field, values in self.traits.memory.items():
      if (found := getattr(self.memory, field)) not in values:
        raise ConfigError(
          f"memory.{field}={found!r}: model.sequence_layer="
          f"{self.sequence_layer} takes {' or '.join(map(repr, values))}"
        )

  @property
  def traits(self) -> Traits:
    """The traits of its sequence layer."""
    return LAYERS[self.sequence_layer]

  @property
  def head_dim(self) -> int:
    return self.width // self.num_heads

  @property
  def kv_heads(self) -> int:
    """Heads of attention's keys and values."""
    return self.num_kv_heads or self.num_heads

  @property
  def blocks(self) -> tuple[str, ...]:
    """The sequence layers that alternate from block to block; else the one."""
    return self.traits.blocks or (self.sequence_layer,)

  @property
  def has_attention(self) -> bool:
    """Whether some or all blocks have attention in place of a memory."""
    return self.traits.attention == "alone"

  @property
  def has_longest_context(self) -> bool:
    """Whether sequences are limited to `context_length` tokens."""
    return self.has_attention and not self.attention_window

  @property
  def memory_chunks(self) -> tuple[int, ...]:
    """Chunk lengths; documents have to begin at a multiple of each."""
    if not self.traits.chunks:
      return ()
    memory = self.memory
    if memory.adaptive and self.traits.adaptive:
      return memory.chunk_length, memory.projection_chunk_length
    return (memory.chunk_length,)

  @property
  def fast_levels(self) -> tuple[str, ...]:
    """Names of everything that learns inside the sequence, fastest first."""
    levels = ()
    if self.traits.learns:
      levels += ("memory",)
    if self.traits.adaptive:
      levels += self.memory.adaptive
    return levels + tuple(f"cms_{i}" for i in range(len(self.cms.fast_lengths)))

  def is_live(self, level: str) -> bool:
    """Whether `level` is written to inside the sequence."""
    return self.inner_rates == "on" and level not in self.frozen_levels
