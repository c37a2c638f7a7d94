"""Kernels and XLA's forms against the token-by-token definitions.

Compares outputs, last state and all gradients on one random problem with
resets; the reference runs in float64 on the CPU, on the same rounded inputs.
The error of an array is its largest error over the reference's largest entry.
Bounds, as in the tests: 1e-5 sqrt(T) in float32 (a state is a sum over T
tokens), 2e-2 for bfloat16 activations (state and gates stay float32).

Dimensions: B batch, H heads, T tokens, K key and E value dim, C chunk length.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.generalized_delta_rule import generalized_delta_rule
from pallas_kernels.linear_rule import linear_rule, pallas_gpu
from pallas_kernels.linear_rule.reference import Rates, State, Tokens
from scripts.gpu_check.plan import Row, first_line

Arrays = dict[str, Any]
LOW = ("x", "u", "queries", "keys", "values", "erase_read", "erase_write")
BOUND_BFLOAT16 = 2e-2
_DECAY = math.exp(-0.5)  # RWKV-7's fastest, -log w


class Case(NamedTuple):
  """C, dtype of the activations, and whether there is momentum: with it, reads
  come before writes, as in Titans; without, after, as in the linear layers."""

  chunk: int
  dtype: str
  momentum: bool


FULL = (
  Case(64, "bfloat16", False),
  Case(64, "bfloat16", True),
  Case(16, "bfloat16", False),
  Case(16, "float32", True),
  Case(64, "float32", True),
)
TINY = (Case(16, "bfloat16", False), Case(16, "float32", True))


def rows(
  op: str, implementation: str, dim: int, tiny: bool = False
) -> Iterator[Row]:
  """A row per case, twice: after the forward pass, and with the gradients."""
  cases, tokens = (TINY, 40) if tiny else (FULL, 300)
  for case in cases:
    if op == "generalized_delta_rule" and case.momentum:
      if case.dtype == "bfloat16":
        continue  # without momentum: a repetition
      case = case._replace(momentum=False)
    row: Row = {
      "row": f"{op} {implementation} {dim} {tuple(case)}",
      "op": op,
      "implementation": implementation,
      "K = E": dim,
      "C": case.chunk,
      "dtype": case.dtype,
      "momentum": case.momentum,
    }
    try:
      yield from _check(row, op, implementation, case, dim, tokens)
    except Exception as error:  # e.g. a compiler's: go on to the next case
      yield {**row, "pass": False, "error": first_line(error)}


def _check(
  row: Row, op: str, implementation: str, case: Case, dim: int, tokens: int
) -> Iterator[Row]:
  arrays, reset = _inputs(op, case, tokens, dim)
  run, definition, note = _functions(op, implementation, case)
  run = functools.partial(run, reset=reset)
  row["implementation"] += note
  float32 = 1e-5 * math.sqrt(tokens)
  row["bound"] = float32 if case.dtype == "float32" else BOUND_BFLOAT16
  shapes = jax.eval_shape(run, arrays)
  rng = np.random.default_rng(1)
  cotangents = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)
  want, want_gradients = _oracle(definition, arrays, reset, cotangents)
  errors = {}
  pulled = jax.tree.map(
    lambda x, s: jnp.asarray(x, s.dtype), cotangents, shapes
  )
  gradients = lambda arrays, pulled: jax.vjp(run, arrays)[1](pulled)[0]
  for name, function, arguments, expected in (
    ("forward", run, (arrays,), want),
    ("gradients", gradients, (arrays, pulled), want_gradients),
  ):
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    row[f"{name} compile s"] = time.perf_counter() - start
    found = _errors(compiled(*arguments), expected)
    row[f"{name} error"] = max(found.values())
    errors |= {f"{name} {leaf}": error for leaf, error in found.items()}
    is_within = max(errors.values()) <= row["bound"]
    if name == "gradients" or not is_within:
      row["pass"] = is_within
    yield {**row, "errors": errors}


def _functions(
  op: str, implementation: str, case: Case
) -> tuple[Callable, Callable, str]:
  """(function to check, its definition, a note); of (arrays, reset=...)."""
  if op == "generalized_delta_rule":
    rule = functools.partial(generalized_delta_rule, chunk_length=case.chunk)
    of_tokens = functools.partial(_call, ("keys", "values"))
    return (
      functools.partial(of_tokens, rule, implementation=implementation),
      functools.partial(of_tokens, rule, implementation="reference"),
      "",
    )
  note = ""
  options: Arrays = dict(
    chunk_length=case.chunk, read="pre" if case.momentum else "post"
  )
  if not case.momentum:
    options |= dict(momentum=None, momentum_decay=None)
  rule = functools.partial(linear_rule, **options)
  run = functools.partial(rule, implementation=implementation)
  if implementation == "pallas_gpu" and jax.default_backend() != "gpu":
    run = functools.partial(_interpreted, **options)
    note = " (interpreted)"
  of_tokens = functools.partial(_call, ("x", "u"))
  definition = functools.partial(rule, implementation="reference")
  return (
    functools.partial(of_tokens, run),
    functools.partial(of_tokens, definition),
    note,
  )


def _interpreted(x: jax.Array, u: jax.Array, **rest: Any) -> Any:
  """The GPU's kernel on another backend; arguments as in `linear_rule`."""
  tokens = Tokens(x, u, rest["queries"])
  rates = Rates(**{name: rest[name] for name in Rates._fields})
  state = State(rest["weight"], rest["momentum"])
  return pallas_gpu.linear_rule_gpu(
    tokens,
    rates,
    state,
    read=rest["read"],
    chunk_length=rest["chunk_length"],
    interpret=True,
  )


def _call(
  first: tuple[str, ...], function: Callable, arrays: Arrays, **options: Any
) -> Any:
  """Calls `function` on a dict of arrays, of which `first` are positional."""
  rest = {name: x for name, x in arrays.items() if name not in first}
  return function(*(arrays[name] for name in first), **rest, **options)


def _inputs(
  op: str, case: Case, tokens: int, dim: int
) -> tuple[Arrays, jax.Array]:
  """Random float arguments, and resets [B, H, T], of B 1 and H 2."""
  rng, lead = np.random.default_rng(0), (1, 2, tokens)
  normal = lambda *last: rng.normal(size=(*lead, *last))
  uniform = lambda low, high, *last: rng.uniform(low, high, (*lead, *last))
  unit = normal(dim)
  unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
  weight = rng.normal(size=(1, 2, dim, dim))
  queries = normal(dim) / dim**0.5
  if op == "linear_rule":
    arrays = dict(
      x=unit,
      u=normal(dim),
      queries=queries,
      weight=weight,
      retention=uniform(0.8, 1),
      step_size=uniform(0, 1),
      erase=uniform(0, 1),
    )
    arrays["retention"][:, 0, [5, 20]] = 0
    if case.momentum:
      arrays["momentum"] = rng.normal(size=(1, 2, dim, dim))
      arrays["momentum_decay"] = uniform(0.3, 1)
  else:
    arrays = dict(
      keys=normal(dim),
      values=normal(dim),
      queries=queries,
      log_decay=uniform(-_DECAY, 0, dim),
      erase_read=-unit,
      erase_write=unit * uniform(0, 1, dim),
      weight=weight,
    )
  arrays = {
    name: jnp.asarray(x, case.dtype if name in LOW else "float32")
    for name, x in arrays.items()
  }
  return arrays, jnp.asarray(rng.uniform(size=lead) < 0.05)


def _oracle(
  definition: Callable, arrays: Arrays, reset: jax.Array, cotangents: Any
) -> tuple[Any, Any]:
  """(values, gradients) in float64, on the CPU where jax has one."""
  try:
    device = jax.devices("cpu")[0]
  except RuntimeError:
    device = jax.devices()[0]
  arrays = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)

  def both(arrays: Arrays, cotangents: Any) -> tuple[Any, Any]:
    run = functools.partial(definition, reset=np.asarray(reset))
    out, pull = jax.vjp(run, arrays)
    return out, pull(cotangents)[0]

  with jax.enable_x64(True), jax.default_device(device):
    return jax.tree.map(np.asarray, jax.jit(both)(arrays, cotangents))


def _errors(got: Any, want: Any) -> dict[str, float]:
  """By leaf: the largest error over the largest entry; inf if not finite."""

  def error(a: Any, b: Any) -> float:
    a = np.asarray(a, np.float64)
    if not np.isfinite(a).all():
      return math.inf
    return float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-3))

  leaves = jax.tree_util.tree_leaves_with_path(got)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): error(a, b)
    for (path, a), b in zip(leaves, jax.tree.leaves(want), strict=True)
  }
