"""The model as a nested system: its components by update frequency.

Paper section 3, definitions 2-4: every component is a problem of its own
(objective, context, rule), and the frequency of its updates orders them into
levels; level 1 is the fastest.  Within a sequence a component whose gradients
are taken every C tokens has frequency 1/C; softmax attention, solved anew at
every token, infinity; slow weights 0: they change once per step of the outer
optimizer.  Of two that change equally often the one that the other's update
needs is faster: the optimizer's moments come before the weights they move.  A
level that the config freezes is not written: it is with the slow weights.  CMS
levels that the optimizer changes once in n steps come last.

Its costs are counted (`analysis/costs.py`), nothing is executed.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from etils import epath

from hope_jax.analysis import costs
from hope_jax.analysis.costs import COUNTED
from hope_jax.config import Config, MemoryConfig, ModelConfig
from hope_jax.config.model import TTT_LAYERS
from hope_jax.runs import files

LEGEND = """
x: a layer's input; n: a level's; y, k, v: the sequence layer's output, keys,
values. Proximal step: eta' = eta/(1 + eta‖x‖²); DGD erases alpha eta'
(proximal) or eta' (literal). Flops: matrix products, forward, per token; learn
flops: of writes, and reads of them. Shared bytes: parameters, moments."""
CORPUS, OUTER_LOSS = "the training corpus", "cross entropy of the next token"
META = "start meta-learned by backpropagation"
CMS_PAIRS = {  # what a level learns: key -> value
  "next_token": ("token", "next token"),
  "mixer_linear": ("n", "RMS(y W)"),
  "mixer_value": ("n", "RMS(v)"),
  "mixer_pair": ("RMS(k)", "RMS(v)"),
}

DOT, L2 = "-⟨S k, v⟩", "1/2 ‖S k - v‖²"
LINEAR_RULES = {  # objective and rule, `models/linear.py`, `models/rwkv7.py`
  "retnet": (DOT, "GD, step 1, decay per head"),
  "deltanet": (L2, "GD, step b"),
  "gated_deltanet": (L2, "GD, step b, on the decayed state"),
  "comba": (L2, "GD, step b, decay; erases c b"),
  "mamba2": (DOT, "GD, step dt, decay exp(-dt A)"),
  "mamba": (DOT, "GD, step dt per channel, decay exp(-dt A) per number"),
  "rwkv7": (L2, "GD, step a, decay w, both per channel; erases along kappa"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
  """One problem of the nested system (definitions 3 and 4).

  Attributes:
    frequency: updates per token of a sequence; `math.inf`: non-parametric.
    context: the stream that it learns from.
    transfer: of knowledge between it and the others (section 3.3).
    parameters: slow ones that are its own: its start, its gates.
    state_bytes: per sequence; shared_bytes: parameters and moments, once.
    flops: of the forward pass per token, all layers; learn_flops: part of it.
  """

  name: str
  level: int = 0
  frequency: Fraction | float = Fraction(0)
  context: str = ""
  objective: str = ""
  rule: str = ""
  transfer: str = ""
  parameters: int = 0
  state_bytes: int = 0
  shared_bytes: int = 0
  flops: float = 0.0
  learn_flops: float = 0.0


OTHER_MEMORIES = {  # `models/lstm.py`, `models/srwm.py`
  "lstm": Component(
    name="memory",
    frequency=Fraction(1),
    context="n, h of the last token",
    objective="none: a gated recurrence",
    rule="c <- f c + i tanh(g); h <- o tanh(c)",
    transfer="starts at zero; gates by slow projections of n and h",
  ),
  "srwm": Component(
    name="memory",
    frequency=Fraction(1),
    context="(k, q) = W phi(n), its own, of the last token",
    objective="1/2 ‖W phi(k) - W phi(q)‖²",
    rule="GD, four steps sigmoid(b), its own, one per part of W; momentum:"
    " none; retention: none; read: token_pre",
    transfer=f"{META}; makes its own keys, targets and rates (self-modifying)",
  ),
}


def components(config: Config) -> list[Component]:
  """All components of the model and its optimizer, fastest level first; a
  `rest` where something that was counted belongs to none of them."""
  inner = inside_sequence(config.model)
  frequency = lambda c: c.frequency
  live = sorted(filter(frequency, inner), key=frequency, reverse=True)
  levels = [list(group) for _, group in itertools.groupby(live, frequency)]
  frozen = [component for component in inner if not component.frequency]
  seldom = _steps(config)
  steps = lambda c: seldom.get(c.name, 1)
  slow = sorted(frozen + slow_weights(config), key=steps)
  levels += [moments(config)]
  levels += [list(group) for _, group in itertools.groupby(slow, steps)]
  counted = costs.count(config)
  numbers = lambda name: {f: counted[f].get(name, 0) for f in COUNTED}
  return [
    replace(c, level=level, **numbers(c.name))
    for level, group in enumerate(levels, 1)
    for c in group
    if any(numbers(c.name).values())
  ]


def _steps(config: Config) -> dict[str, int]:
  """Training steps between the optimizer's updates of slow CMS levels."""
  return {f"cms_{i}": n for i, n in config.model.cms.periods.items()}


def inside_sequence(model: ModelConfig) -> list[Component]:
  """Attention, and everything that learns inside the sequence or could."""
  found = [attention(model)] if model.attends else []
  if any(name in LINEAR_RULES for name in model.pattern):
    found += [linear(model)]
  elif model.sequence_layer in OTHER_MEMORIES:
    found = [OTHER_MEMORIES[model.sequence_layer]]
  elif model.sequence_layer in TTT_LAYERS:
    found = [test_time_training(model)]
  elif not model.has_attention:
    found += memories(model)
  found += [cms_level(model, i) for i in range(len(model.cms.fast_lengths))]
  freeze = functools.partial(
    replace,
    frequency=Fraction(0),
    context=CORPUS,
    objective=OUTER_LOSS,
    rule="not written: stays at its start",
    transfer=META,
  )
  is_frozen = lambda c: (
    c.name in model.fast_levels and not model.is_live(c.name)
  )
  return [freeze(c) if is_frozen(c) else c for c in found]


def attention(model: ModelConfig) -> Component:
  """Softmax attention, non-parametric solution of an L2 regression (eq. 62)."""
  context = f"tokens so far, at most {model.context_length:,}"
  if model.attention_window:
    context = f"last {model.attention_window:,} tokens"
  if model.sequence_layer == "titans_mac":
    context = f"segment's tokens, {model.memory.chunk_length:,}, and of M"
  return Component(
    name="attention",
    frequency=math.inf,
    context=f"(k, v) of the {context}",
    objective="sum_i exp(q·k_i / sqrt(d)) ‖v_i - o‖²",
    rule="non-parametric: solved exactly at every token",
    transfer="direct conditioning: q, k, v by slow projections",
  )


def linear(model: ModelConfig) -> Component:
  """A matrix memory that is written and read at every token (section 3.1)."""
  (name,) = (name for name in model.pattern if name in LINEAR_RULES)
  objective, rule = LINEAR_RULES[name]
  return Component(
    name="memory",
    frequency=Fraction(1),
    context="(k, v) of the last token",
    objective=objective,
    rule=f"{rule}; momentum: none; retention: zero; read: token_post",
    transfer="starts at zero; q, k, v and gates by slow projections",
  )


def test_time_training(model: ModelConfig) -> Component:
  """TTT's memory (`memory/ttt.py`)."""
  length = model.memory.chunk_length
  return Component(
    name="memory",
    frequency=Fraction(1, length),
    context=f"(k, v) of the last {length} tokens",
    objective="1/2 ‖k + LN(M(k)) - v‖²",
    rule="GD, step eta by position; momentum: none; retention: none; error"
    " clip: 0; read: token_post",
    transfer=f"{META}; q, k, v and eta by slow projections",
  )


def memories(model: ModelConfig) -> list[Component]:
  """The long-term memory (eq. 86-90) and the adaptive projections and gates,
  which are memories themselves (eq. 83-88)."""
  cfg = model.memory
  inputs = "q, k, v and gates by slow projections"
  if cfg.adaptive:
    inputs += f", but {', '.join(cfg.adaptive)} by memories"
  prefix, found = "", []
  if model.sequence_layer == "memora":
    prefix = "KL to the last weights, in logits "
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
      Component(
        name=name,
        frequency=Fraction(1, length),
        context=f"(k, {target}) of the last {length} tokens",
        objective=loss,
        rule=prefix + memory_rule(cfg, is_box),
        transfer="; ".join([META, *own]),
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


def cms_level(model: ModelConfig, level: int) -> Component:
  """A fast level of the continuum memory system (eq. 70-74)."""
  cfg = model.cms
  length = cfg.fast_lengths[level]
  key, value = CMS_PAIRS.get(cfg.signal) or CMS_PAIRS[cfg.value]
  objective = f"associative: 1/2 ‖MLP({key}) - {value}‖²"
  rate = f"proximal step / {length}"
  if cfg.signal == "next_token":
    objective, rate = OUTER_LOSS, f"step, mean of {length} tokens"
  nested = f"restarts from cms_{level + 1} when that one's chunk ends"
  is_last = level + 1 == len(cfg.fast_lengths)
  transfer = {
    "sequential": "backpropagation through the chain of levels (eq. 73)",
    "nested": f"{'never restarts' if is_last else nested} (eq. 72)",
    "independent": "learned weighted sum of the levels (eq. 74)",
  }
  retention = f"start, half-life {h:g}" if (h := cfg.half_life) else "none"
  return Component(
    name=f"cms_{level}",
    frequency=Fraction(1, length),
    context=f"({key}, {value}) of the last {length} tokens",
    objective=objective,
    rule=f"GD; {rate}; momentum: none; retention:"
    f" {retention}; error clip: {cfg.error_clip:g}; read: chunk",
    transfer=f"{META}; {transfer[cfg.connection]}",
  )


def moments(config: Config) -> list[Component]:
  """AdamW's moments, associative memories of gradients (section 4, App. C):
  steps of gradient descent on their objectives with rates 1 - b1, 1 - b2."""
  b1, b2 = config.opt.b1, config.opt.b2
  rules = {
    "mu": ("-⟨m, g⟩", f"GD with decay: m <- {b1:g} m + {1 - b1:g} g"),
    "nu": ("1/2 ‖v - g²‖²", f"GD: v <- {b2:g} v + {1 - b2:g} g²"),
  }
  seldom = [f"{name}: {n:,}" for name, n in _steps(config).items() if n > 1]
  if seldom:
    names = ", ".join(seldom)
    rules["sum"] = (
      "-⟨s, g⟩",
      f"GD: s <- s + g/n; read and set to 0 every n steps ({names})",
    )
  return [
    Component(
      name=f"adamw_{name}",
      context="gradients g of the outer loss, one per step",
      objective=objective,
      rule=rule,
      transfer="the model generates its context (backpropagation), it the step",
    )
    for name, (objective, rule) in rules.items()
  ]


def slow_weights(config: Config) -> list[Component]:
  """What only the outer optimizer updates: the lowest level."""
  cms, data = config.model.cms, config.data
  use = {"projections": "q, k, v and output of the sequence layer"}
  for i in range(len(cms.fast_lengths), cms.levels):
    use[f"cms_{i}"] = "what the fast levels pass on"
  what = "start" if cms.connection == "nested" else "values"
  use["cms_shared"] = f"{what} of the CMS levels"
  if not cms.levels and config.model.ffn_hidden:
    use["ffn"] = "what the sequence layer passes on"
  use |= {"embedding": "tokens and logits", "rest": "what is none of these"}
  tokens = data.batch_size * data.sequence_length
  seldom = _steps(config)

  def rule(name: str) -> str:
    steps = seldom.get(name, 1)
    if steps == 1:
      return f"AdamW, once per step of {tokens:,} tokens"
    return (
      f"AdamW: changes every {steps:,} steps of {tokens:,} tokens, by their"
      " mean gradient"
    )

  return [
    Component(
      name=name,
      context=CORPUS,
      objective=OUTER_LOSS,
      rule=rule(name),
      transfer=f"direct conditioning: {what}",
    )
    for name, what in use.items()
  ]


def report(config: Config, found: Sequence[Component]) -> dict[str, Any]:
  """JSON-ready; frequencies are exact, `1/16`, `0` or `inf`."""
  return {
    "model": config.model.sequence_layer,
    "sequence_length": config.data.sequence_length,
    "tokens_per_step": config.data.batch_size * config.data.sequence_length,
    "components": [
      dataclasses.asdict(c) | {"frequency": str(c.frequency)} for c in found
    ],
    "total": {f: sum(getattr(c, f) for c in found) for f in COUNTED},
  }


def markdown(content: Mapping[str, Any]) -> str:
  """The table of a `report`, one line per component and one of totals."""
  fields = [field.name for field in dataclasses.fields(Component)]
  rows = [[field.replace("_", " ") for field in fields]]
  for line in (*content["components"], {"name": "total", **content["total"]}):
    cells = [line.get(field, "") for field in fields]
    rows.append([c if isinstance(c, str) else f"{c:,.0f}" for c in cells])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  rows.insert(1, ["-" * width for width in widths])
  padded = [map(str.ljust, row, widths) for row in rows]
  return "".join(f"| {' | '.join(row)} |\n" for row in padded)


def draw(config: Config, found: Sequence[Component], path: epath.Path) -> None:
  """The spectrum: components over their update period in tokens."""
  from matplotlib.figure import Figure

  inner = {c.frequency for c in found} - {0, math.inf}
  periods = sorted(float(1 / frequency) for frequency in inner) or [1.0]
  low, high = periods[0] / 8, periods[-1] * 16
  tokens = config.data.batch_size * config.data.sequence_length
  ticks = {period: f"{period:g}" for period in periods}
  ticks |= {low: "0 (non-\nparametric)", high: f"one step\n({tokens:,})"}
  steps = _steps(config)
  seldom = {high * n: f"\n\n{n:,} steps" for n in steps.values() if n > 1}
  ticks |= seldom  # below the others, for they may be near
  figure = Figure(figsize=(8.5, 1.6 + 0.3 * len(found)), layout="constrained")
  axes = figure.subplots()
  for y, c in enumerate(found):
    x = high * steps.get(c.name, 1)
    if c.frequency:
      x = float(1 / c.frequency) or low
    axes.plot([low / 4, x], [y, y], f"C{c.level - 1}o-", markevery=[1])
    note = ", not written" if c.rule.startswith("not written") else ""
    axes.text(x, y, f"   level {c.level}{note}", va="center", fontsize=8)
  axes.set_xscale("log", base=2)
  axes.set_xticks(list(ticks), list(ticks.values()))
  axes.set_xticks([], minor=True)
  right = max([high, *seldom]) * 16
  axes.set(xlim=(low / 4, right), xlabel="update period (tokens)")
  axes.set_yticks(range(len(found)), [c.name for c in found])
  axes.invert_yaxis()
  axes.set_title(f"{config.model.sequence_layer}: levels by update frequency")
  with files.writing(path) as beside:
    figure.savefig(beside, format="png", dpi=150)
