"""What every component of the nested system costs (`analysis/levels.py`).

Numbers are counted without executing anything: parameters and bytes from the
shapes of the model's initial state, FLOPs from its forward pass, module by
module.  The FLOPs of learning (writes, and reads of them) are the difference
from the same model without that learning.
"""

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree

from hope_jax.analysis import flops as flops_lib
from hope_jax.config import Config, ModelConfig
from hope_jax.models import language_model, parameters
from hope_jax.optim import registry as optimizers

# `jax.named_scope` -> the component that its FLOPs belong to.
SCOPES = {"recurrence": "recurrence", "scores": "attention"}
Owned = Iterable[tuple[tuple[str, ...], Any]]  # components, what they share
Share = tuple[float, Mapping[str, int]]  # an amount, weights of its owners
COUNTED = "parameters", "state_bytes", "shared_bytes", "flops", "learn_flops"


def count(config: Config) -> dict[str, Mapping[str, Any]]:
  """Field of COUNTED -> {component: number}; `rest` belongs to no component."""
  model = config.model
  tokens = jax.ShapeDtypeStruct((1, config.data.sequence_length), jnp.int32)
  init = language_model.LanguageModel(model).init
  key = jax.eval_shape(jax.random.key, 0)
  variables: Any = jax.eval_shape(init, key, tokens)
  kinds = parameters.kinds(variables["params"])
  params = nn.unbox(variables["params"])
  sizes, sizes_in_bytes = apportion(owned(kinds, params))
  flops, learn_flops = count_flops(model, kinds, params, tokens)
  return {
    "parameters": sizes,
    "state_bytes": apportion(state_parts(model))[1],
    "shared_bytes": moments(config, kinds, params) + sizes_in_bytes,
    "flops": flops,
    "learn_flops": learn_flops,
  }


def owned(kinds: Tree, params: Tree) -> Owned:
  """(components, parameter) of all parameters."""
  leaves = zip(jax.tree.leaves(kinds), jax.tree.leaves(params), strict=True)
  yield from ((kind.owner, leaf) for kind, leaf in leaves)


def state_parts(model: ModelConfig) -> Owned:
  """(components, part) of the fast state of one sequence."""
  state = jax.eval_shape(lambda: language_model.init_state(model, 1))
  for one in state if isinstance(state, tuple) else (state,):
    yield from one.parts(model)


def moments(config: Config, kinds: Tree, params: Tree) -> Counter:
  """Bytes of the optimizer's state by moment, and of its sums of gradients."""
  name, periods = config.opt.name, config.model.cms.periods
  optimizer = optimizers.make(config.opt, config.train.steps, kinds, periods)
  described = optimizers.OPTIMIZERS[name].describe(config.opt)
  fields = {moment.field: moment.field for moment in described}
  fields["acc_grads"] = "sum"
  found = Counter()
  state = jax.eval_shape(optimizer.init, params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    for field in set(parts) & set(fields):
      found[f"{name}_{fields[field]}"] += leaf.size * leaf.dtype.itemsize
  return found


def apportion(parts: Owned) -> tuple[Counter, Counter]:
  """Numbers of elements and of bytes by component."""
  sizes, sizes_in_bytes = Counter(), Counter()
  for names, part in parts:
    for leaf in jax.tree.leaves(part):
      share, left = divmod(leaf.size, len(names))
      for i, name in enumerate(names):
        size = share + (i < left)
        sizes[name] += size
        sizes_in_bytes[name] += size * leaf.dtype.itemsize
  return sizes, sizes_in_bytes


def count_flops(
  model: ModelConfig, kinds: Tree, params: Tree, tokens: Tree
) -> tuple[dict[str, float], dict[str, float]]:
  """FLOPs per token of the forward pass by component: all, and learning's.

  The twin, which writes nothing, reads every M_0 once per token, so its FLOPs
  inside the sequence layer are divided in proportion to the sizes of the M_0.
  As an approximation, so is the learning of the adaptive projections and gates
  (boxes), which are computed as one linear map.
  """
  initial = [k.role == "initial" for k in jax.tree.leaves(kinds)]
  starts = itertools.compress(owned(kinds, params), initial)
  starts = apportion(starts)[0]
  boxes = [name for name in starts if name != "memory" and model.is_live(name)]
  cms = [f"cms_{i}" for i in range(model.cms.levels)]
  fast = [c for c in cms[: len(model.cms.fast_lengths)] if model.is_live(c)]
  scopes = functools.partial(
    flops_by_owner, kinds=kinds, params=params, tokens=tokens
  )
  live, twin = scopes(model), scopes(replace(model, inner_rates="off"))
  frozen, given = model.frozen_levels, live
  if model.cms.signal == "next_token":  # its gradient passes the model's top
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
  if "recurrence" in twin:  # without a twin: all its FLOPs write and read
    learning.append((twin.pop("recurrence"), {"memory": 1}))
  pools = {"mixer": starts, "nested": dict.fromkeys(cms, 1)}
  read: list[Share] = [
    (n, pools.get(name, {name: 1})) for name, n in twin.items()
  ]
  counted = flops_lib.count(functools.partial(_logits, model), params, tokens)
  rest = counted - sum(amount for amount, _ in read + learning)
  if abs(rest) > 1e-9 * counted:
    read.append((rest, {"rest": 1}))
  return _share(read + learning, tokens.size), _share(learning, tokens.size)


def _share(amounts: Sequence[Share], tokens: int) -> dict[str, float]:
  """Splits each amount, per token, in proportion to weights; sums by name."""
  shares = defaultdict(float)
  for amount, weights in amounts:
    for name, weight in weights.items():
      shares[name] += amount / tokens * weight / sum(weights.values())
  return shares


def flops_by_owner(
  model: ModelConfig, kinds: Tree, params: Tree, tokens: Tree
) -> dict[str, float]:
  """FLOPs of the forward pass by component, or by what several share: `mixer`
  (a memory's own work) and `nested` (one block of all CMS levels)."""
  owners = owners_of_modules(kinds)
  counts = defaultdict(float)
  logits = functools.partial(_logits, model)
  for scope, n in flops_lib.by_scope(logits, params, tokens).items():
    counts[owner(scope, owners)] += n
  return counts


def owners_of_modules(kinds: Tree) -> dict[tuple[str, ...], set[str]]:
  """Path of a module, outermost name first -> the components that own its
  parameters."""
  found = defaultdict(set)
  for path, kind in jax.tree_util.tree_leaves_with_path(kinds):
    names = tuple(key.key for key in path)
    for length in range(1, len(names)):
      found[names[:length]].update(kind.owner)
  return found


def owner(scope: str, owners: Mapping[tuple[str, ...], set[str]]) -> str:
  """The component of a scope: what owns the parameters of its module."""
  words = scope.split("/")
  if named := [SCOPES[word] for word in words if word in SCOPES]:
    return named[0]
  known = {name for path in owners for name in path}
  names = tuple(word for word in words if word in known)
  while names and names not in owners:
    names = names[:-1]
  if names and names[-1] == "mixer":
    return "mixer"
  found = owners.get(names, set())
  if len(found) > 1 and "cms_shared" in found:
    return "nested" if names[-1] == "levels" else "cms_shared"
  return min(found) if len(found) == 1 else "rest"


def _logits(model: ModelConfig, params: Tree, tokens: jax.Array) -> jax.Array:
  """The forward pass without remat, which is not the model's own work."""
  memory = replace(model.memory, remat="none")
  model = replace(model, remat="none", memory=memory)
  module = language_model.LanguageModel(model)
  return language_model.forward(module, params, tokens).logits
