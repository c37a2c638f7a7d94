"""The adaptive projections of Hope: memories that generate their own values.

Every box in {k, v, q, eta, alpha} (paper eq. 83-88) is a memory M_box that acts
on per-head slices p of slow projections, at its chunk's first state:

  k_t = l2norm(M_k(p_k)), v_t = M_v(p_v), q_t = l2norm(M_q(p_q))
  eta_t = softplus(M_eta(p_k) + p_eta)
  alpha_t = sigmoid(-(M_alpha(p_k) + p_alpha))
  vhat_box = M_box(v_t), M_box learns k_t -> vhat_box with eta_t, alpha_t

A box that is not adaptive returns p.  M_eta and M_alpha have one output and no
residual.  No box reads the main memory, so their scan, which has its own chunk
length, runs before that of `deep.run_memory`.  The boxes always learn by
setting B.

All boxes learn from the same k_t with the same gates, so their hidden layers
are written as one linear map with G F outputs.

Legend: B batch, H heads, G boxes, T tokens, C chunk length, K head dim,
F hidden of one box, E output dim.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import ArrayPytree as Tree

from hope_jax.config import MemoryConfig
from hope_jax.memory import architectures, chunks, fused, rules
from hope_jax.memory import dynamics as dynamics_lib
from hope_jax.memory.chunks import MemoryOutput
from hope_jax.memory.norms import l2_normalize
from hope_jax.memory.rules import Gates
from pallas_kernels.linear_rule import one_chunk as chunk_lib

PROJECTIONS, GATES = ("k", "v", "q"), ("eta", "alpha")


class Boxes(NamedTuple):
  """Weights of the adaptive boxes; None for a kind without boxes.

  hidden [..., H, G F, K] (all boxes), projection [..., H, G, K, F] (k, v, q),
  gate [..., H, G, 1, F] (eta, alpha).
  """

  hidden: Tree
  projection: Tree
  gate: Tree


class Slow(NamedTuple):
  """Outputs of slow weights: projections [B, H, T, K], gate terms [B, H, T].

  `eta` and `alpha` are logits.  `beta` is the momentum decay, None without.
  """

  k: jax.Array
  v: jax.Array
  q: jax.Array
  eta: jax.Array
  alpha: jax.Array
  beta: jax.Array | None


class Projected(NamedTuple):
  """k, v, q [B, H, T, K] (k, q of norm 1) and the memory's gates."""

  k: jax.Array
  v: jax.Array
  q: jax.Array
  gates: Gates


def members(cfg: MemoryConfig, kind: tuple[str, ...]) -> tuple[str, ...]:
  """The adaptive boxes of a kind, in their order along axis G."""
  return tuple(box for box in kind if box in cfg.adaptive)


def _place(box: str, cfg: MemoryConfig) -> tuple[int, str, int]:
  """A box's index among all boxes, its kind, and its index within the kind."""
  projections = members(cfg, PROJECTIONS)
  gates = members(cfg, GATES)
  number = (projections + gates).index(box)
  if box in projections:
    return number, "projection", number
  return number, "gate", number - len(projections)


def _hidden_rows(boxes: Boxes, number: int, cfg: MemoryConfig) -> slice:
  """A box's rows of `boxes.hidden` [..., G F, K]."""
  size = boxes.hidden.shape[-2] // len(cfg.adaptive)
  return slice(number * size, (number + 1) * size)


def without_box(boxes: Boxes, box: str, cfg: MemoryConfig) -> Boxes:
  """`boxes` with the weights of one of them set to zero."""
  number, kind, index = _place(box, cfg)
  output = getattr(boxes, kind).at[..., index, :, :].set(0)
  if boxes.hidden is not None:
    rows = _hidden_rows(boxes, number, cfg)
    boxes = boxes._replace(hidden=boxes.hidden.at[..., rows, :].set(0))
  return boxes._replace(**{kind: output})


def only_box(boxes: Boxes, box: str, cfg: MemoryConfig) -> list[jax.Array]:
  """The weights of one box: its output layer and its hidden rows."""
  number, kind, index = _place(box, cfg)
  weights = [getattr(boxes, kind)[..., index, :, :]]
  if boxes.hidden is not None:
    rows = _hidden_rows(boxes, number, cfg)
    weights.append(boxes.hidden[..., rows, :])
  return weights


def _by_box(x: jax.Array, count: int) -> jax.Array:
  """[..., C, G F] -> [..., G, C, F]."""
  size = x.shape[-1] // count
  parts = [x[..., i * size : (i + 1) * size] for i in range(count)]
  return jnp.stack(parts, axis=-3)


def _side_by_side(x: jax.Array) -> jax.Array:
  """[..., G, C, F] -> [..., C, G F]."""
  parts = [x[..., i, :, :] for i in range(x.shape[-3])]
  return jnp.concatenate(parts, axis=-1)


def _apply(weight: jax.Array, x: jax.Array) -> jax.Array:
  """Applies each box's weight [..., G, E, F] (B may be missing) to its input
  [..., G, C, F]: [..., G, C, E]."""
  return jnp.einsum("...CF,...EF->...CE", x, weight)


def project(boxes: Boxes | None, p: Slow, cfg: MemoryConfig) -> Projected:
  """k, v, q and gates, with `boxes` the whole weights M_0 + D of the adaptive
  boxes at one state (None: there are none)."""
  made = {"k": p.k, "v": p.v, "q": p.q, "eta": p.eta, "alpha": p.alpha}
  if boxes is not None:
    projections, gates = members(cfg, PROJECTIONS), members(cfg, GATES)
    split = len(projections)
    inputs = {**made, "eta": p.k, "alpha": p.k}
    x = jnp.stack([inputs[box] for box in projections + gates], axis=-3)
    features = x
    if boxes.hidden is not None:
      z = _apply(_boxed(boxes.hidden, x.shape[-3]), x)
      features = architectures.activate(z, cfg.activation)[0]
    if projections:
      y = _apply(boxes.projection, features[..., :split, :, :])
      y = y if boxes.hidden is None else x[..., :split, :, :] + y
      made.update({box: y[..., i, :, :] for i, box in enumerate(projections)})
    if gates:
      y = _apply(boxes.gate, features[..., split:, :, :])
      for i, box in enumerate(gates):
        made[box] = made[box] + y[..., i, :, 0]
  return Projected(
    k=l2_normalize(made["k"]),
    v=made["v"],
    q=l2_normalize(made["q"]),
    gates=open_gates(made["eta"], made["alpha"], p.beta, cfg),
  )


def open_gates(
  eta: jax.Array, alpha: jax.Array, beta: jax.Array | None, cfg: MemoryConfig
) -> Gates:
  """Gates from the logits of eta and alpha; `beta` is used as it is given."""
  return Gates(rules.learn_rate(eta, cfg), jax.nn.sigmoid(-alpha), beta)


def _boxed(hidden: Tree, count: int) -> jax.Array:
  """[..., G F, K] -> [..., G, F, K]."""
  return hidden.reshape(*hidden.shape[:-2], count, -1, hidden.shape[-1])


class BoxTrace(NamedTuple):
  """Forward pass of all boxes on one input; None for a kind without boxes."""

  features: Tree  # [..., G, C, F], input of the output layers
  slope: Tree  # act'(z), [..., C, G F]
  projection: Tree  # [..., G, C, K]
  gate: Tree  # [..., G, C, 1]


def forward(boxes: Boxes, x: jax.Array, cfg: MemoryConfig) -> BoxTrace:
  """M_box(x) for the same x [..., C, K] in every box."""
  projections, gates = members(cfg, PROJECTIONS), members(cfg, GATES)
  count, split = len(projections) + len(gates), len(projections)
  if boxes.hidden is None:
    x_G = jnp.stack([x] * count, axis=-3)
    features, slope, residual = x_G, None, None
  else:
    z = architectures.apply(x, boxes.hidden)
    features, slope = architectures.activate(z, cfg.activation)
    features, residual = _by_box(features, count), x[..., None, :, :]

  def outputs(weight, features, residual):
    if weight is None:
      return None
    y = _apply(weight, features)
    return y if residual is None else residual + y

  return BoxTrace(
    features,
    slope,
    outputs(boxes.projection, features[..., :split, :, :], residual),
    outputs(boxes.gate, features[..., split:, :, :], None),
  )


def run_projections(
  initial: Boxes,
  p: Slow,
  cfg: MemoryConfig,
  *,
  state: chunks.ChunkState | None = None,
  documents: jax.Array | None = None,
  frozen: tuple[str, ...] = (),
  with_dynamics: bool = False,
) -> MemoryOutput:
  """Runs all adaptive boxes along the sequence; outputs are `Projected`.

  Args:
    initial: M_0 of the boxes.
    p: slow projections and gate terms of the whole sequence.
    state, documents, with_dynamics: as in `deep.run_memory`.
    frozen: boxes that are not written to (in the twin all of them).
  """
  if not cfg.adaptive:
    return MemoryOutput(project(None, p, cfg), state, None)
  if all(box in frozen for box in cfg.adaptive):
    return MemoryOutput(_slow_projections(initial, p, cfg), state, None)
  return chunks.run(
    memory(initial, cfg, frozen),
    initial,
    p,
    axis=2,
    state=state,
    documents=documents,
    with_dynamics=with_dynamics,
  )


def memory(
  initial: Boxes, cfg: MemoryConfig, frozen: tuple[str, ...] = ()
) -> chunks.Memory:
  """The rule of all boxes as a `chunks.Memory`."""

  def step(base, start, now, p, places):
    start = architectures.whole(base, start)
    made = project(start, p, cfg)
    gates = rules.retained(made.gates, cfg)
    chunk = _Chunk(made, gates, rules.subchunk_decays(gates, places.live))
    after, traces = learn_chunk(start, now, chunk, cfg, frozen=frozen)
    return after, made, (gates, traces)

  def dynamics(base, after, trace, p, places):
    del p
    gates, traces = trace
    final = architectures.whole(base, after.weight)
    later = forward(final, traces.keys, cfg)
    return _dynamics(
      (initial, final), gates, traces, later, cfg, live=places.live
    )

  kernel = None
  if not frozen:
    kernel = fused.kernel(fused_chunk, cfg, name="projections")
  return chunks.Memory(
    cfg.projection_chunk_length,
    cfg.remat,
    step,
    dynamics=dynamics,
    has_momentum=cfg.momentum != "none",
    acts_on_whole=cfg.retention == "zero",
    kernel=kernel,
  )


def fused_chunk(
  initial: Boxes,
  now: chunks.Fast,
  p: Slow,
  live: jax.Array | None,
  cfg: MemoryConfig,
) -> tuple[Projected, chunks.Fast]:
  """One chunk of one head in a kernel: (`Projected`, state after)."""
  start = now.weight
  if cfg.retention != "zero":
    start = architectures.whole(initial, start)
  made = project(start, p, cfg)
  gates = rules.retained(made.gates, cfg)
  decays = rules.subchunk_decays(gates, live, arithmetic=fused.KERNEL)
  chunk = _Chunk(made, gates, decays)
  after, _ = learn_chunk(start, now, chunk, cfg, arithmetic=fused.KERNEL)
  return made, after


def _slow_projections(initial: Boxes, p: Slow, cfg: MemoryConfig) -> Projected:
  """The twin's projections: every box at M_0, computed chunk by chunk."""
  layout = chunks.plan(p.k.shape[2], cfg.projection_chunk_length, None)
  base = chunks.per_sequence(initial, p.k.shape[0], ("heads",))
  p = jax.tree.map(lambda x: layout.split(x, axis=2), p)
  made = jax.lax.map(lambda p: project(base, p, cfg), p)
  return jax.tree.map(lambda x: layout.merge(x, axis=2), made)


class _Chunk(NamedTuple):
  """The boxes' outputs for a chunk's tokens, the gates with which they learn,
  and the rule's decays."""

  made: Projected
  gates: Gates
  decays: Tree


class _Traces(NamedTuple):
  """The tokens' k, the boxes' outputs for k, and those for v (the targets)."""

  keys: jax.Array
  outputs: BoxTrace
  targets: BoxTrace


def learn_chunk(
  start: Boxes,
  now: chunks.Fast,
  chunk: _Chunk,
  cfg: MemoryConfig,
  *,
  frozen: tuple[str, ...] = (),
  arithmetic: chunk_lib.Arithmetic = chunk_lib.XLA,
) -> tuple[chunks.Fast, _Traces]:
  """One chunk of all boxes, at whole weights `start`: (state after, traces)."""
  made = chunk.made
  trace, targets = forward(start, made.k, cfg), forward(start, made.v, cfg)
  lead = made.k.ndim - 2  # axes B, H; none in a kernel
  lead_decays = lead if arithmetic.in_kernel else lead + 1  # subchunks, B, H
  expand = lambda tree, axis: jax.tree.map(
    lambda x: jnp.expand_dims(x, axis), tree
  )
  length = cfg.projection_chunk_length
  rule = rules.LayerRule(chunk.gates, chunk.decays, cfg, length)
  boxed = rules.LayerRule(
    expand(chunk.gates, lead), expand(chunk.decays, lead_decays), cfg, length
  )
  momentum = now.momentum or Boxes(None, None, None)
  weight, after_momentum, back = {}, {}, []

  def write(layer, inputs, error, rule):
    state = getattr(now.weight, layer), getattr(momentum, layer)
    out = rules.write_layer(
      chunk_lib.Tokens(inputs, error),
      chunk_lib.State(*state),
      rule,
      arithmetic=arithmetic,
    )
    weight[layer], after_momentum[layer] = out.weight, out.momentum

  first = 0
  for kind, boxes in (("projection", PROJECTIONS), ("gate", GATES)):
    boxes = members(cfg, boxes)
    if not boxes:
      continue
    error = rules.output_error(
      getattr(trace, kind), getattr(targets, kind), cfg
    )
    if frozen:
      on = jnp.array([box not in frozen for box in boxes], jnp.float32)
      error *= on.reshape(-1, *(1,) * 2)[(None,) * lead]
    back.append(jnp.einsum("...CE,...EF->...CF", error, getattr(start, kind)))
    features = trace.features[..., first : first + len(boxes), :, :]
    write(kind, features, error, boxed)
    first += len(boxes)

  if start.hidden is not None:
    slope = _by_box(trace.slope, len(cfg.adaptive))
    errors = rules.clip_norm(
      jnp.concatenate(back, axis=-3) * slope, cfg.error_clip
    )
    write("hidden", made.k, _side_by_side(errors), rule)
  absent = dict.fromkeys(Boxes._fields)
  written = Boxes(**(absent | weight))
  after = chunks.Fast(_unless_frozen(written, now.weight, frozen, cfg))
  if now.momentum is not None:
    after = dataclasses.replace(
      after, momentum=Boxes(**(absent | after_momentum))
    )
  return after, _Traces(made.k, trace, targets)


def _unless_frozen(
  new: Boxes, old: Boxes, frozen: tuple[str, ...], cfg: MemoryConfig
) -> Boxes:
  """`new` for boxes that learn, `old` for frozen ones, which would otherwise
  decay even without an error."""
  if not frozen:
    return new
  projections, gates = members(cfg, PROJECTIONS), members(cfg, GATES)

  def choose(boxes: tuple[str, ...], new: Tree, old: Tree) -> Tree:
    if new is None:
      return None
    is_on = [box not in frozen for box in boxes]
    is_on = np.repeat(is_on, new.shape[2] // len(boxes))
    return jnp.where(is_on.reshape(-1, *(1,) * (new.ndim - 3)), new, old)

  kinds = (projections + gates, projections, gates)
  return Boxes(*map(choose, kinds, new, old))


def _dynamics(
  weights: tuple[Boxes, Boxes],
  gates: Gates,
  traces: _Traces,
  later: BoxTrace,
  cfg: MemoryConfig,
  *,
  live: jax.Array | None,
) -> dict[str, dict[str, jax.Array]]:
  """Scalars about one chunk, per kind of box, as in `deep.dynamics_of`.

  `weights` are M_0 and the whole weights after the chunk; `later` are the
  outputs at the latter.
  """
  initial, final = weights
  trace, targets = traces.outputs, traces.targets
  shared = {
    "learn_rate": dynamics_lib.mean(gates.learn_rate, live),
    "half_life": dynamics_lib.half_life(gates.retention, live),
  }
  hidden = {}
  if initial.hidden is not None:
    hidden = {"hidden": (initial.hidden, final.hidden)}
  dynamics = {}
  for kind in ("projection", "gate"):
    if getattr(trace, kind) is None:
      continue
    size = {**hidden, kind: (getattr(initial, kind), getattr(final, kind))}
    change = [
      dynamics_lib.relative_change(base, weight, is_whole=True)
      for base, weight in size.values()
    ]
    dynamics[kind] = {
      **shared,
      "relative_change": jnp.mean(jnp.stack(change)),
      **dynamics_lib.loss_dynamics(
        getattr(trace, kind),
        getattr(later, kind),
        getattr(targets, kind),
        cfg.loss_factor,
        cfg.error_clip,
        is_dot=cfg.setting == "chunk_dot",
        live=live,
      ),
    }
  return dynamics
