"""Descriptions, in words, of memories that several sequence layers share.

In the paper (section 3 and App. C) every component is a problem with an
objective, a context and a rule; `analysis/levels.py` orders them by frequency.
"""

import math
from fractions import Fraction

from hope_jax.config import MemoryConfig, ModelConfig
from hope_jax.models.interface import META_LEARNED, Problem

# Objectives of matrix memories.
DOT, L2 = "-⟨S k, v⟩", "1/2 ‖S k - v‖²"


def attention(context: str) -> Problem:
  """Softmax attention: non-parametric solution of an L2 regression (eq. 62)."""
  return Problem(
    name="attention",
    frequency=math.inf,
    context=f"(k, v) of the {context}",
    objective="sum_i exp(q·k_i / sqrt(d)) ‖v_i - o‖²",
    rule="non-parametric: solved exactly at every token",
    transfer="direct conditioning: q, k, v by slow projections",
  )


def linear(objective: str, rule: str) -> Problem:
  """A matrix memory that is written and read at every token (section 3.1)."""
  return Problem(
    name="memory",
    frequency=Fraction(1),
    context="(k, v) of the last token",
    objective=objective,
    rule=f"{rule}; momentum: none; retention: zero; read: token_post",
    transfer="starts at zero; q, k, v and gates by slow projections",
  )


def deep_memories(config: ModelConfig, prefix: str = "") -> list[Problem]:
  """The long-term memory (eq. 86-90), and the adaptive projections and gates,
  which are memories themselves (eq. 83-88).  `prefix` precedes their rule."""
  cfg = config.memory
  inputs = "q, k, v and gates by slow projections"
  if cfg.adaptive:
    inputs += f", but {', '.join(cfg.adaptive)} by memories"
  found = []
  for name in ("memory", *cfg.adaptive):
    is_box = name != "memory"
    m = f"M_{name}" if is_box else "M"
    is_self = is_box or cfg.target == "self"
    target = f"{m}(v)" if is_self else "v"
    loss = f"{Fraction(str(cfg.loss_factor))} ‖{m}(k) - {target}‖²"
    own = ["generates its own targets (self-modifying)"] if is_self else []
    own += [f"generates {name} of all memories" if is_box else inputs]
    if cfg.setting == "chunk_dot":
      loss = f"-{Fraction(str(2 * cfg.loss_factor))} ⟨{m}(k), {target}⟩"
    if cfg.is_exact and not is_box:
      hidden = f"; hidden layer {loss}" if cfg.architecture == "mlp" else ""
      loss = f"output layer -⟨D(k), {target} - M_0(k)⟩{hidden}"
    length = cfg.projection_chunk_length if is_box else cfg.chunk_length
    found.append(
      Problem(
        name=name,
        frequency=Fraction(1, length),
        context=f"(k, {target}) of the last {length} tokens",
        objective=loss,
        rule=prefix + memory_rule(cfg, is_box),
        transfer="; ".join([META_LEARNED, *own]),
      )
    )
  return found


def memory_rule(cfg: MemoryConfig, is_box: bool) -> str:
  """The inner rule in the config's words (`memory/rules.py`, App. C)."""
  rate = exact = "proximal step" if cfg.proximal else "step"
  clip = f"{cfg.error_clip:g}"
  if cfg.step_scale == "mean":
    length = cfg.projection_chunk_length if is_box else cfg.chunk_length
    rate += f" / {length}"
  if cfg.setting == "negative_eigenvalues":
    exact = "step eta/max(1, ‖x‖²), eta < 2"
  if cfg.is_exact and not is_box:
    hidden = f" (hidden layer: {rate})"
    rate = exact + (hidden if cfg.architecture == "mlp" else "")
    clip += f", of the target: {cfg.target_clip:g}"
  read = "chunk" if is_box else cfg.read
  return (
    f"{'GD' if cfg.delta_rule == 'none' else f'DGD {cfg.delta_rule}'}; {rate};"
    f" momentum: {cfg.momentum}; retention: {cfg.retention}; error clip:"
    f" {clip}; read: {read}"
  )
