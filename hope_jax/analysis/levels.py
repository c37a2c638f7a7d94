"""The model as a nested system: its components by update frequency.

Paper section 3, definitions 2-4: every component is a problem of its own
(objective, context, rule), and update frequencies order the components into
levels; level 1 is the fastest.  A component whose gradients are taken every C
tokens of a sequence has frequency 1/C; softmax attention, solved anew at every
token, infinity; slow weights, which change once per step of the outer
optimizer, 0.  Of two components that change equally often, the one whose result
the other's update needs is faster: the optimizer's moments come before the
weights they move.  A level that the config freezes is never written and counts
as a slow weight.  CMS levels that the optimizer changes once in n steps come
last.

Costs are counted (`analysis/costs.py`); nothing is executed.
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
from hope_jax.config import Config, Json, ModelConfig
from hope_jax.models import cms, registry
from hope_jax.models.interface import META_LEARNED, OUTER_LOSS
from hope_jax.optim.registry import OPTIMIZERS
from hope_jax.runs import files

LEGEND = """
x: a layer's input; n: a level's; y, k, v: the sequence layer's output, keys,
values. Proximal step: eta' = eta/(1 + eta‖x‖²); DGD erases alpha eta'
(proximal) or eta' (literal). Flops: matrix products, forward, per token; learn
flops: of writes, and reads of them. Shared bytes: parameters, moments."""
CORPUS = "the training corpus"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
  """One problem of the nested system (definitions 3 and 4).

  Attributes:
    frequency: updates per token of a sequence; `math.inf`: non-parametric.
    context: the stream that it learns from.
    transfer: how it exchanges knowledge with the others (section 3.3).
    parameters: its own slow parameters: its start, its gates.
    state_bytes: per sequence; shared_bytes: of parameters and moments.
    flops: of the forward pass per token, all layers; learn_flops: learning's.
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


def components(config: Config) -> list[Component]:
  """All components of the model and its optimizer, fastest level first; `rest`
  holds what was counted but belongs to no other component."""
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
  return config.model.cms.periods


def inside_sequence(model: ModelConfig) -> list[Component]:
  """Attention, and all levels that learn inside the sequence or are frozen."""
  problems = [*registry.describe(model), *cms.describe(model)]
  found = [Component(**problem._asdict()) for problem in problems]
  freeze = functools.partial(
    replace,
    frequency=Fraction(0),
    context=CORPUS,
    objective=OUTER_LOSS,
    rule="not written: stays at its start",
    transfer=META_LEARNED,
  )
  is_frozen = lambda c: (
    c.name in model.fast_levels and not model.is_live(c.name)
  )
  return [freeze(c) if is_frozen(c) else c for c in found]


def moments(config: Config) -> list[Component]:
  """The optimizer's moments, associative memories of gradients (section 4)."""
  optimizer = config.opt.name
  rules = {
    moment.field: (moment.objective, moment.rule)
    for moment in OPTIMIZERS[optimizer].describe(config.opt)
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
      name=f"{optimizer}_{name}",
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
  seldom, title = _steps(config), OPTIMIZERS[config.opt.name].title

  def rule(name: str) -> str:
    steps = seldom.get(name, 1)
    if steps == 1:
      return f"{title}, once per step of {tokens:,} tokens"
    return (
      f"{title}: changes every {steps:,} steps of {tokens:,} tokens, by their"
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


def report(config: Config, found: Sequence[Component]) -> Json:
  """The components as JSON; frequencies are exact: `1/16`, `0` or `inf`."""
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
  ticks |= seldom  # below the others, which may be near
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
