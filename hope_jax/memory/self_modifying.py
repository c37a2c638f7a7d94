"""The adaptive projections of Hope: memories that generate their own values.

For every box in {k, v, q, eta, alpha} (paper eq. 83-88), each a memory M_box
on per-head slices p of slow projections, taken at its chunk's first state:

  k_t = l2norm(M_k(p_k)), v_t = M_v(p_v), q_t = l2norm(M_q(p_q))
  eta_t = softplus(M_eta(p_k) + b), alpha_t = sigmoid(-(M_alpha(p_k) + b))
  vhat_box = M_box(v_t), M_box learns k_t -> vhat_box with eta_t, alpha_t

A box that is not adaptive passes p on (k, v, q) or is a slow gate (eta,
alpha).  None of the boxes reads the main memory, so that their scan, with its
own chunk length, runs before that of `deep.run_memory`.  Boxes of one shape
lie side by side on axis G: "projection" (k, v, q) and "gate" (eta, alpha).
The boxes always learn by setting B.

Legend: B batch, H heads, G boxes, T tokens, C chunk length, K head dim.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hope_jax.config import MemoryConfig
from hope_jax.memory import architectures, chunks, deep, rules
from hope_jax.memory.architectures import Weights, l2_normalize
from hope_jax.memory.rules import Gates
from pallas_kernels.linear_rule import chunked

GROUPS = {"projection": ("k", "v", "q"), "gate": ("eta", "alpha")}


class Slow(NamedTuple):
  """What slow weights say: projections [B, H, T, K], gate terms [B, H, T].

  `eta` and `alpha` are logits: learned biases, plus a slow projection where
  the gate is not adaptive.  `beta` is the momentum decay, None without.
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


def group_boxes(cfg: MemoryConfig) -> dict[str, tuple[str, ...]]:
  """Adaptive boxes per group; groups without any are left out."""
  groups = {
    name: tuple(box for box in boxes if box in cfg.adaptive)
    for name, boxes in GROUPS.items()
  }
  return {name: boxes for name, boxes in groups.items() if boxes}


def project(
  slow: dict[str, Weights] | None,
  fast: dict[str, Weights] | None,
  p: Slow,
  cfg: MemoryConfig,
) -> Projected:
  """k, v, q and gates at one state of the boxes."""
  boxes = group_boxes(cfg)
  made = {}
  inputs = {"k": p.k, "v": p.v, "q": p.q, "eta": p.k, "alpha": p.k}
  for name, members in boxes.items():
    x = jnp.stack([inputs[box] for box in members], axis=2)
    outputs = architectures.forward(
      None if slow is None else slow[name],
      None if fast is None else fast[name],
      x,
      cfg.activation,
    ).outputs
    made.update({box: outputs[:, :, i] for i, box in enumerate(members)})
  eta = p.eta + made["eta"][..., 0] if "eta" in made else p.eta
  alpha = p.alpha + made["alpha"][..., 0] if "alpha" in made else p.alpha
  return Projected(
    k=l2_normalize(made.get("k", p.k)),
    v=made.get("v", p.v),
    q=l2_normalize(made.get("q", p.q)),
    gates=Gates(jax.nn.softplus(eta), jax.nn.sigmoid(-alpha), p.beta),
  )


def run_projections(
  initial: dict[str, Weights],
  p: Slow,
  cfg: MemoryConfig,
  *,
  state: chunks.ChunkState | None = None,
  segments: jax.Array | None = None,
  frozen: tuple[str, ...] = (),
  with_dynamics: bool = False,
) -> tuple[Projected, chunks.ChunkState | None, dict[str, Any] | None]:
  """Runs all adaptive boxes along the sequence.

  Args:
    initial: M_0 per group, hidden [H, G, F, K], output [H, G, E, F].
    p: slow projections and gate terms of the whole sequence.
    frozen: boxes that are not written to; all of them: the twin.
  """
  boxes = group_boxes(cfg)
  if all(box in frozen for box in cfg.adaptive):
    return project(initial, None, p, cfg), state, None
  chunk_length = cfg.projection_chunk_length
  layout = chunks.plan(p.k.shape[2], chunk_length, state)
  continued = state is not None
  if state is None:
    state = chunks.fresh(deep.zero_state(initial, p.k.shape[0], cfg))
  slow, now, origin = deep.anchored(initial, state.now, cfg)
  start = deep.anchored(initial, {**state.now, "weight": state.start}, cfg)[1]
  xs = jax.tree.map(lambda x: layout.split(x, axis=2), p)

  def step(start, now, p, live):
    made = project(slow, start, p, cfg)
    gates = made.gates._replace(
      retention=deep.retained(made.gates.retention, cfg)
    )
    if live is not None:
      live = jnp.broadcast_to(live[None, None], gates.retention.shape)
    decays = chunked.chunk_decays(
      gates.retention, gates.momentum_decay, live=live
    )
    decays, box_gates = jax.tree.map(
      lambda x: jnp.expand_dims(x, 2), (decays, gates)
    )
    weight, momentum, dynamics = {}, {}, {}
    for name, members in boxes.items():
      base = None if slow is None else slow[name]
      on = jnp.array([box not in frozen for box in members], jnp.float32)
      k, v = (
        jnp.repeat(x[:, :, None], len(members), axis=2)
        for x in (made.k, made.v)
      )
      trace = architectures.forward(base, start[name], k, cfg.activation)
      targets = architectures.forward(
        base, start[name], v, cfg.activation
      ).outputs
      errors = rules.layer_errors(base, start[name], trace, targets, cfg)
      group_gates = box_gates._replace(
        learn_rate=box_gates.learn_rate * on[None, None, :, None]
      )
      _, after = deep.write_layers(
        trace,
        errors,
        {
          "weight": now["weight"][name],
          "momentum": now["momentum"] and now["momentum"][name],
        },
        group_gates,
        decays,
        cfg,
        divide=deep.chunk_divisors(cfg, chunk_length, exact=False),
        is_chunk_start=not continued,
      )
      weight[name], momentum[name] = after["weight"], after["momentum"]
      if with_dynamics:
        dynamics[name] = deep.dynamics_of(
          initial[name], base, trace, targets, group_gates, after, cfg, k
        )
    if now["momentum"] is None:
      momentum = None
    return {"weight": weight, "momentum": momentum}, (made, dynamics)

  resets = chunks.chunk_resets(segments, layout)
  (made, dynamics), state = chunks.scan_chunks(
    step,
    chunks.ChunkState(now, start["weight"], state.position),
    xs,
    layout,
    chunk_length=chunk_length,
    policy=cfg.remat,
    continued=continued,
    resets=None if resets is None else (resets, origin),
  )
  made = jax.tree.map(lambda x: layout.merge(x, axis=2), made)
  dynamics = {name: deep.summarize(d) for name, d in dynamics.items()}
  return made, deep.difference(initial, state, cfg), dynamics
