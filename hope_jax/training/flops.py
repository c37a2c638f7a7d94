"""Floating-point operations counted from a jaxpr, and the peak of a chip.

Matrix products and convolutions only: 2 M N K each.  A scan counts its body
times its length, a cond its dearest branch, a shard_map its body on every
device, a Pallas kernel its grid times its body; everything else that holds a
jaxpr (jit, remat, custom derivatives) is looked into.  A `while` of unknown
length counts once.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hope_jax.config import Config
from hope_jax.models.language_model import LanguageModel, forward

# Part of jax's device_kind, lower case -> dense bfloat16 FLOP/s of one chip.
# The first entry that matches counts.  From the makers' data sheets.
PEAK_FLOPS = {
  "tpu v6 lite": 918e12,
  "tpu v6e": 918e12,
  "tpu v5 lite": 197e12,
  "tpu v5e": 197e12,
  "tpu v5": 459e12,
  "tpu v4": 275e12,
  "h200": 989e12,
  "h100 pcie": 756e12,
  "h100": 989e12,
  "a100": 312e12,
}


def peak_flops(device: Any) -> float | None:
  """Peak of one chip, None where it is not known (a CPU)."""
  kind = device.device_kind.lower()
  return next((v for key, v in PEAK_FLOPS.items() if key in kind), None)


def count(function: Any, *args: Any) -> float:
  """FLOPs of `function(*args)`; args may be ShapeDtypeStructs."""
  return _count_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def per_token(config: Config, params: Any = None) -> float:
  """FLOPs of loss and gradient per token, nothing recomputed counted twice.

  Recomputation (remat, kernels) is left out of the count: it is the chip's
  work, not the model's.  `params` (shapes are enough) saves tracing the model's
  initialisation.
  """
  memory = dataclasses.replace(
    config.model.memory, remat="none", implementation="xla"
  )
  model = LanguageModel(
    dataclasses.replace(config.model, remat="none", memory=memory)
  )
  length = config.data.sequence_length
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  if params is None:
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    params = nn.unbox(variables["params"])

  def total(params: Any, tokens: jax.Array) -> jax.Array:
    return jnp.sum(forward(model, params, tokens).logits)

  return count(jax.grad(total), params, tokens) / length


def _count_jaxpr(jaxpr: Any) -> float:
  return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    return _dot_general(equation)
  if name == "conv_general_dilated":
    return _convolution(equation)
  inner = [_count_jaxpr(jaxpr) for jaxpr in _jaxprs(params)]
  if name == "cond":
    return max(inner)
  if name == "scan":
    return params["length"] * sum(inner)
  if name == "shard_map":
    axes = params.get("manual_axes") or params["mesh"].axis_names
    return math.prod(params["mesh"].shape[a] for a in axes) * sum(inner)
  if name == "pallas_call":
    grid = getattr(params.get("grid_mapping"), "grid", ())
    return math.prod(n for n in grid if isinstance(n, int)) * sum(inner)
  return sum(inner)


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
  """Every jaxpr among the parameters of an equation."""
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      item = getattr(item, "jaxpr", item)
      if hasattr(item, "eqns"):
        yield item


def _dot_general(equation: Any) -> float:
  (contracted, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  inner = math.prod(left[axis] for axis in contracted)
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * inner


def _convolution(equation: Any) -> float:
  kernel = equation.invars[1].aval.shape
  spec = equation.params["dimension_numbers"].rhs_spec
  # The kernel's input-feature dimension is already per group.
  inner = math.prod(kernel) / kernel[spec[0]]
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * inner
