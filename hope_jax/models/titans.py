"""Titans and self-modifying Titans (Hope's sequence layer).

  n -> p_q, p_k, p_v = SiLU(conv(n W)) per head        (slow)
  p -> q, k, v, eta, alpha                 `memory/self_modifying.py`
  o = RMS_head(M_{t-1}(q_t)) * silu(n W_g);  y = o W_o  `memory/deep.py`

with M a deep memory per head that learns k -> vhat.  Titans' long-term memory
(LMM; 2501.00663) is the case without adaptive projections: q, k, v are the
slow ones (q, k of norm 1) and the gates are slow projections of n.  In Hope
(2512.24695, eq. 83-90) some of k, v, q, eta, alpha are memories, too.  DLA
(Atlas, 2505.23735) is Titans with a dot product as objective and no momentum.
Memora uses the memory of `memory/memora.py` instead.

Legend: B batch, T tokens, D model, H heads, K head dim, F memory hidden,
G memories side by side.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree

from hope_jax.config import MemoryConfig, ModelConfig
from hope_jax.memory import chunks, deep, memora, rules, self_modifying
from hope_jax.memory.architectures import Weights
from hope_jax.memory.norms import rms_normalize
from hope_jax.memory.self_modifying import Boxes
from hope_jax.models import layers
from hope_jax.models.interface import (
  FastState,
  Level,
  MixerOutput,
  Parts,
  owned,
)
from hope_jax.models.parameters import parameter


class SlowProjections(nn.Module):
  """SiLU(conv(n W)) for query, key and value, each [B, H, T, K]."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    conv_state: dict[str, jax.Array] | None,
    documents: jax.Array | None,
  ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    cfg = self.config
    projected, new_state = layers.projections(
      x_BTD, layers.full_widths(cfg), cfg, conv_state, documents
    )
    projected = {
      name: layers.split_heads(nn.silu(p), cfg.num_heads)
      for name, p in projected.items()
    }
    return projected, new_state


class Gates(nn.Module):
  """Logits of learn rate and retention, momentum decay beta, [B, H, T] each.

  Each is a slow projection plus a bias per head.  Biases start at the
  configured learn rate, at half-lives spread log-uniformly over the heads, and
  at the configured momentum.  The output of an `adaptive` gate's memory is
  added to the slow logit later, as M_k(x) = x + ... adds to the slow key;
  without the slow part Hope learned to recall about twice as slowly
  (experiments/mqar).
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> dict[str, jax.Array]:
    cfg = self.config.memory
    heads = self.config.num_heads
    half_lives = jnp.exp(
      jnp.linspace(
        math.log(cfg.half_life_min), math.log(cfg.half_life_max), heads
      )
    )
    starts = {
      "eta": jnp.full(
        heads, rules.learn_rate_logit(cfg.initial_learn_rate, cfg)
      ),
      "alpha": jnp.log(jnp.expm1(math.log(2) / half_lives)),
      "beta": jnp.full(
        heads, math.log(cfg.initial_momentum / (1 - cfg.initial_momentum))
      ),
    }
    if cfg.momentum == "none":
      del starts["beta"]
    gates = {}
    for name, start in starts.items():
      # An adaptive gate also owns its slow part.
      owner = (name if name in cfg.adaptive else "memory",)
      bias = parameter(
        self,
        f"{name}_bias",
        # With a dtype: a weakly typed array would recompile the second step.
        lambda key, shape, start=start: start.astype(jnp.float32),
        (heads,),
        ("heads",),
        role="gate",
        owner=owner,
      )
      logit = jnp.broadcast_to(
        bias[None, :, None], (x_BTD.shape[0], heads, x_BTD.shape[1])
      )
      slope = layers.dense(
        heads, self.config, ("embed", "heads"), name, role="gate", owner=owner
      )
      logit = logit + slope(x_BTD).swapaxes(1, 2).astype(jnp.float32)
      gates[name] = nn.sigmoid(logit) if name == "beta" else logit
    return gates


def initial_shapes(config: ModelConfig) -> tuple[Weights, Boxes]:
  """Shapes of M_0: the main memory and the adaptive boxes."""
  cfg, heads, dim = config.memory, config.num_heads, config.head_dim
  is_matrix = cfg.architecture == "matrix"
  hidden = dim if is_matrix else cfg.hidden or dim
  projections = len(self_modifying.members(cfg, self_modifying.PROJECTIONS))
  gates = len(self_modifying.members(cfg, self_modifying.GATES))
  count = projections + gates
  return (
    Weights(None if is_matrix else (heads, hidden, dim), (heads, dim, hidden)),
    Boxes(
      None if is_matrix or not count else (heads, count * hidden, dim),
      (heads, projections, dim, hidden) if projections else None,
      (heads, gates, 1, hidden) if gates else None,
    ),
  )


class InitialWeights(nn.Module):
  """M_0 of every memory: hidden std K^-1/2, output std 0.1 (boxes 0.02).

  An output of 0 would leave the hidden layer without a gradient.  Memora's M_0
  are logits with std 1.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self) -> tuple[Weights, Boxes]:
    memory, boxes = initial_shapes(self.config)
    hidden_std, output_std = self.config.head_dim**-0.5, 0.1
    if self.config.sequence_layer == "memora":
      hidden_std = output_std = 1.0

    def weights(group, shapes, output_std):
      return type(shapes)(
        *(
          shape
          and self._weight(
            f"{group}_{name}",
            hidden_std if name == "hidden" else output_std,
            shape,
          )
          for name, shape in shapes._asdict().items()
        )
      )

    return weights("memory", memory, output_std), weights("boxes", boxes, 0.02)

  def _weight(self, name: str, std: float, shape: tuple[int, ...]) -> Tree:
    axes = ("heads", *("boxes",) * (len(shape) - 3), "memory_out", "memory_in")
    kind = name.removeprefix("boxes_")
    return parameter(
      self,
      name,
      nn.initializers.normal(std),
      shape,
      axes,
      role="initial",
      owner=_members(self.config.memory).get(kind, ("memory",)),
    )


class ReadOut(nn.Module):
  """RMS_head(o) * silu(n W_g), then the output projection."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, o_BHTK: jax.Array) -> jax.Array:
    cfg = self.config
    scale = parameter(
      self,
      "norm_scale",
      nn.initializers.ones,
      (cfg.head_dim,),
      ("norm",),
      role="norm",
    )
    normed = rms_normalize(o_BHTK, cfg.norm_eps)
    normed = normed * scale[None, None, None]
    o_BTD = layers.merge_heads(normed)
    gate = layers.dense(cfg.width, cfg, ("embed", "heads"), "gate")(x_BTD)
    o_BTD = o_BTD.astype(gate.dtype) * nn.silu(gate)
    return layers.dense(
      cfg.width, cfg, ("heads", "embed"), "output", is_output=True
    )(o_BTD)


@flax.struct.dataclass
class TitansState(FastState):
  """Main memory, adaptive boxes, and the last inputs of the convolutions."""

  memory: chunks.ChunkState = owned("memory")
  boxes: chunks.ChunkState = owned("boxes")
  conv: dict[str, jax.Array] = owned("projections")

  def parts(self, config: ModelConfig) -> Parts:
    """See `FastState`; boxes of a kind share arrays."""
    for owner, part in super().parts(config):
      if owner != ("boxes",):
        yield owner, part
        continue
      for name, kind in _members(config.memory).items():
        of_kind = lambda boxes, name=name: boxes and getattr(boxes, name)
        now, start = part.now, part.start
        yield kind, (of_kind(now.weight), of_kind(now.momentum), of_kind(start))
      yield config.memory.adaptive or ("memory",), part.position

  def fast_levels(
    self, initial: Mapping[str, Tree], config: ModelConfig
  ) -> dict[str, Level]:
    """See `FastState`."""
    found = {"memory": memory_level(initial, self.memory)}
    boxes = Boxes(*(initial.get(f"boxes_{name}") for name in Boxes._fields))
    now = self.boxes.now
    for box in config.memory.adaptive:
      pick = functools.partial(_only_box, box=box, config=config)
      found[box] = Level(pick(boxes), pick(now.weight), pick(now.momentum))
    return found

  def reset(self, level: str, config: ModelConfig) -> "TitansState":
    """See `FastState`."""
    if level == "memory":
      return dataclasses.replace(self, memory=self.memory.reset())
    if level not in config.memory.adaptive:
      return super().reset(level, config)
    without = lambda boxes: (
      boxes and self_modifying.without_box(boxes, level, config.memory)
    )
    now, start = self.boxes.now, self.boxes.start
    now = dataclasses.replace(
      now, weight=without(now.weight), momentum=without(now.momentum)
    )
    boxes = chunks.ChunkState(now, without(start), self.boxes.position)
    return dataclasses.replace(self, boxes=boxes)


def memory_level(
  initial: Mapping[str, Tree], state: chunks.ChunkState
) -> Level:
  """The main memory as a `Level`."""
  start = Weights(*(initial.get(f"memory_{name}") for name in Weights._fields))
  return Level(start, state.now.weight, state.now.momentum)


def _only_box(boxes: Boxes | None, box: str, config: ModelConfig) -> Tree:
  """The weights (or momenta) of one box; None if `boxes` is None."""
  return boxes and self_modifying.only_box(boxes, box, config.memory)


def _members(cfg: MemoryConfig) -> dict[str, tuple[str, ...]]:
  """The boxes that share each array of `Boxes`."""
  return {
    "hidden": cfg.adaptive,
    "projection": self_modifying.members(cfg, self_modifying.PROJECTIONS),
    "gate": self_modifying.members(cfg, self_modifying.GATES),
  }


def init_state(
  config: ModelConfig, batch_size: int, read_size: int | None = None
) -> TitansState:
  """Fast state before the first token: D = 0 and S = 0 in all memories."""
  cfg = config.memory
  memory, boxes = (
    type(shapes)(*(shape and jnp.zeros(shape) for shape in shapes))
    for shapes in initial_shapes(config)
  )
  has_momentum = cfg.momentum != "none"

  def zero(tree: Tree, chunk_length: int) -> chunks.ChunkState:
    now = chunks.zero_state(tree, batch_size, has_momentum=has_momentum)
    return chunks.fresh(now, chunk_length, read_size)

  return TitansState(
    zero(memory, cfg.chunk_length),
    zero(boxes, cfg.projection_chunk_length),
    layers.init_conv_state(config, batch_size, layers.full_widths(config)),
  )


class DeepMemory(nn.Module):
  """The memory layer: Titans, or Hope if it has adaptive projections."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    state: TitansState | None = None,
    documents: jax.Array | None = None,
  ) -> MixerOutput:
    return read(self, self.config, x_BTD, state, documents)


def read(
  module: nn.Module,
  cfg: ModelConfig,
  x_BTD: jax.Array,
  state: TitansState | None,
  documents: jax.Array | None,
) -> MixerOutput:
  """The memory layer, with its parts as submodules of `module`."""
  with_dynamics = layers.wants_dynamics(module)
  projected, conv = SlowProjections(cfg, name="projections")(
    x_BTD, state.conv if state else None, documents
  )
  gates = Gates(cfg, name="gates")(x_BTD)
  memory, boxes = InitialWeights(cfg, name="initial")()
  made = self_modifying.run_projections(
    boxes,
    self_modifying.Slow(
      k=projected["key"],
      v=projected["value"],
      q=projected["query"],
      eta=gates["eta"],
      alpha=gates["alpha"],
      beta=gates.get("beta"),
    ),
    cfg.memory,
    state=state.boxes if state else None,
    documents=documents,
    frozen=tuple(b for b in cfg.memory.adaptive if not cfg.is_live(b)),
    with_dynamics=with_dynamics,
  )
  for name, values in (made.dynamics or {}).items():
    layers.sow_dynamics(module, name, values)
  k, v, q, opened = made.outputs
  rule = memora if cfg.sequence_layer == "memora" else deep
  out = rule.run_memory(
    memory,
    deep.Tokens(k, v, q, opened),
    cfg.memory,
    state=state.memory if state else None,
    documents=documents,
    writes=cfg.is_live("memory"),
    with_dynamics=with_dynamics,
  )
  layers.sow_dynamics(module, "memory", out.dynamics)
  y_BTD = ReadOut(cfg, name="readout")(x_BTD, out.outputs)
  keys, values = layers.merge_heads(k), layers.merge_heads(v)
  if state is not None:
    state = dataclasses.replace(
      state, memory=out.state, boxes=made.state, conv=conv
    )
  return MixerOutput(y_BTD, keys, values, state)
