"""What every component of the nested system costs (`analysis/levels.py`).

Numbers are counted, nothing is executed: parameters and bytes from the shapes
of the model's initial state, FLOPs from its forward pass, module by module;
those of learning (writes, reads of them) are the difference when it is frozen.
"""

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hope_jax.analysis import flops as flops_lib
from hope_jax.config import Config, ModelConfig
from hope_jax.memory.self_modifying import GATES, PROJECTIONS, members
from hope_jax.models import language_model
from hope_jax.optim import adamw

# Paths of parameters and states, scopes of FLOPs -> component, or a pool that
# several components share (mixer, boxes, nested); the first match counts.
OWNERS = (
  (r"(?:cms|levels)/\w+_(\d+)", r"cms_\1"),
  (r"^(?:start|tokens|stream|pending|position|begins|\w*document)", "cms_0"),
  (r"cms/levels", "nested"),
  (r"cms\b", "cms_shared"),
  (r"mixer/recurrence", "recurrence"),
  (r"mixer/gates/(eta|alpha)", r"\1"),
  (r"mixer/memory_[qkv]", "projections"),
  (r"mixer/(?:gates|memory|initial/(?!boxes))", "memory"),
  (r"mixer/(?:boxes|initial/boxes)", "boxes"),
  (r"mixer/(?:keys|values|position|first)\b", "attention"),
  (r"mixer/attention/(?:conv|query|key|value|out)", "projections"),
  (r"mixer/(?:attention|persistent)", "attention"),
  (
    r"norm_mixer|mixer/(?:norm|proj|read|conv|recurrent|shift|query|key|value|out)",
    "projections",
  ),
  (r"mixer\b", "mixer"),
  (r"ffn", "ffn"),
  (r"embed|lm_head|norm_out|norm_in", "embedding"),
)
Leaves = Iterable[tuple[str, Any]]  # with their paths
Share = tuple[float, Mapping[str, int]]  # an amount, weights of its owners
COUNTED = "parameters", "state_bytes", "shared_bytes", "flops", "learn_flops"


def count(config: Config) -> dict[str, Mapping[str, Any]]:
  """Every field of COUNTED -> {component: number}; `rest`: nobody's."""
  model = config.model
  tokens = jax.ShapeDtypeStruct((1, config.data.sequence_length), jnp.int32)
  init = language_model.LanguageModel(model).init
  key = jax.eval_shape(jax.random.key, 0)
  variables: Any = jax.eval_shape(init, key, tokens)
  params = nn.unbox(variables["params"])
  state = jax.eval_shape(lambda: language_model.init_state(model, 1))
  optimizer = adamw.make(config.opt, config.train.steps, model.cms.periods)
  shared = Counter()
  for path, leaf in named(jax.eval_shape(optimizer.init, params)):
    if moment := re.search(r"/(mu|nu|acc_grads)/", path):
      name = {"acc_grads": "sum"}.get(moment[1], moment[1])
      shared[f"adamw_{name}"] += leaf.size * leaf.dtype.itemsize
  sizes, sizes_in_bytes = apportion(named(params), model)
  flops, learn_flops = count_flops(model, params, tokens)
  return {
    "parameters": sizes,
    "state_bytes": apportion(named(state), model)[1],
    "shared_bytes": shared + sizes_in_bytes,
    "flops": flops,
    "learn_flops": learn_flops,
  }


def owner(path: str, model: ModelConfig) -> str:
  """The component or pool of a path or scope; `rest` if none is known."""
  for pattern, name in OWNERS:
    if match := re.search(pattern, path):
      name = match.expand(name)
      is_slow_gate = name in GATES and name not in model.memory.adaptive
      return "memory" if is_slow_gate else name
  return "rest"


def owners(path: str, model: ModelConfig) -> tuple[str, ...]:
  """The components that share a parameter or a state equally, by its path."""
  name = owner(path, model)
  if name != "boxes":
    return ("cms_shared" if name == "nested" else name,)
  kinds = {"projection": PROJECTIONS, "gate": GATES}
  kind = kinds.get(re.split("[/_]", path)[-1], PROJECTIONS + GATES)
  return members(model.memory, kind) or ("memory",)


def named(tree: Any) -> Leaves:
  """(path, leaf) of all leaves."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def apportion(leaves: Leaves, model: ModelConfig) -> tuple[Counter, Counter]:
  """Numbers of elements and of bytes by component."""
  sizes, sizes_in_bytes = Counter(), Counter()
  for path, leaf in leaves:
    names = owners(path, model)
    part, left = divmod(leaf.size, len(names))
    for i, name in enumerate(names):
      size = part + (i < left)
      sizes[name] += size
      sizes_in_bytes[name] += size * leaf.dtype.itemsize
  return sizes, sizes_in_bytes


def count_flops(
  model: ModelConfig, params: Any, tokens: Any
) -> tuple[dict[str, float], dict[str, float]]:
  """FLOPs per token of the forward pass by component: all, and learning's.

  The twin (nothing is written) reads every M_0 once per token, so that what it
  spends inside the sequence layer is shared in proportion to their sizes.  So
  is, not exactly, the learning of the boxes, which are one linear map.
  """
  starts = [leaf for leaf in named(params) if "/initial/" in leaf[0]]
  starts = apportion(starts, model)[0]
  boxes = [name for name in starts if name != "memory" and model.is_live(name)]
  cms = [f"cms_{i}" for i in range(model.cms.levels)]
  fast = [c for c in cms[: len(model.cms.fast_lengths)] if model.is_live(c)]
  scopes = functools.partial(flops_by_owner, params=params, tokens=tokens)
  live, twin = scopes(model), scopes(replace(model, inner_rates="off"))
  frozen, given = model.frozen_levels, live
  if model.cms.signal == "next_token":  # its gradient is of the model's top
    frozen += tuple(fast)
    given = scopes(replace(model, frozen_levels=frozen))
  frozen += ("memory",) if "memory" in model.fast_levels else ()
  no_memory = scopes(replace(model, frozen_levels=frozen))
  learning: list[Share] = [
    (sum(live.values()) - sum(given.values()), dict.fromkeys(fast, 1)),
    (given["mixer"] - no_memory["mixer"], {"memory": 1}),
    (no_memory["mixer"] - twin["mixer"], {box: starts[box] for box in boxes}),
    (given["nested"] - twin["nested"], dict.fromkeys(fast, 1)),
    *((given[name] - twin[name], {name: 1}) for name in fast),
  ]
  if "recurrence" in twin:  # it has no twin: all it does is to write and read
    learning.append((twin.pop("recurrence"), {"memory": 1}))
  pools = {"mixer": starts or {"attention": 1}, "nested": dict.fromkeys(cms, 1)}
  read: list[Share] = [
    (n, pools.get(name, {name: 1})) for name, n in twin.items()
  ]
  counted = flops_lib.count(functools.partial(_logits, model), params, tokens)
  rest = counted - sum(amount for amount, _ in read + learning)
  if abs(rest) > 1e-9 * counted:
    read.append((rest, {"rest": 1}))
  return _share(read + learning, tokens.size), _share(learning, tokens.size)


def _share(amounts: Sequence[Share], tokens: int) -> dict[str, float]:
  """Every amount, per token, in proportion to its weights; sums by name."""
  shares = defaultdict(float)
  for amount, weights in amounts:
    for name, weight in weights.items():
      shares[name] += amount / tokens * weight / sum(weights.values())
  return shares


def flops_by_owner(
  model: ModelConfig, params: Any, tokens: Any
) -> dict[str, float]:
  """FLOPs of the forward pass by what `owner` says of their scopes."""
  counts = defaultdict(float)
  traced = jax.make_jaxpr(functools.partial(_logits, model))(params, tokens)
  for scope, n in _by_scope(traced.jaxpr, ""):
    counts[owner(scope, model)] += n
  return counts


def _logits(model: ModelConfig, params: Any, tokens: jax.Array) -> jax.Array:
  """The forward pass; recomputation is not the model's own work."""
  memory = replace(model.memory, remat="none")
  model = replace(model, remat="none", memory=memory)
  module = language_model.LanguageModel(model)
  return language_model.forward(module, params, tokens).logits


def _by_scope(jaxpr: Any, scope: str) -> Iterator[tuple[str, float]]:
  """(scope, FLOPs) of every matrix product; scopes are Linen's modules."""
  for equation in jaxpr.eqns:
    here = f"{scope}/{equation.source_info.name_stack}"
    kind, params = equation.primitive.name, equation.params
    times = params["length"] if kind == "scan" else 1
    for part in jax.tree.leaves(list(params.values())):
      part = getattr(part, "jaxpr", part)
      if hasattr(part, "eqns"):
        yield from ((s, times * n) for s, n in _by_scope(part, here))
    if kind in ("dot_general", "conv_general_dilated"):
      product = functools.partial(equation.primitive.bind, **params)
      yield here, flops_lib.count(product, *(x.aval for x in equation.invars))
