"""Floating-point operations counted from a jaxpr, and the peak of a device.

Matrix products and convolutions only: 2 M N K each.  A scan counts its body
times its length, a cond its most expensive branch, a shard_map its body on
every device, a Pallas kernel its grid times its body; the jaxprs of everything
else (jit, remat, custom derivatives) count once, and so does a `while`, whose
length is unknown.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree

from hope_jax.config import Config
from hope_jax.models.language_model import LanguageModel, forward


class Peak(NamedTuple):
  """Dense bfloat16 FLOP/s of one chip, the cores that share them, and how many
  of these are one JAX device, unless the device itself reports it."""

  flops: float
  cores: int = 1
  cores_of_device: int = 1


# JAX's device_kind as `_model` writes it -> peak, from vendors' data sheets.
# A variant must be listed itself: variants differ by up to a factor of six.
PEAK_FLOPS = {
  "tpu v3": Peak(123e12, cores=2),
  "tpu v4 lite": Peak(138e12),
  "tpu v4": Peak(275e12, cores=2, cores_of_device=2),
  "tpu v5 lite": Peak(197e12),
  "tpu v5e": Peak(197e12),
  "tpu v5": Peak(459e12, cores=2, cores_of_device=2),
  "tpu v5p": Peak(459e12, cores=2, cores_of_device=2),
  "tpu v6 lite": Peak(918e12),
  "tpu v6e": Peak(918e12),
  "tpu7x": Peak(2307e12, cores=2),
  "a10": Peak(125e12),
  "a30": Peak(165e12),
  "a40": Peak(149.7e12),
  "a100 sxm4": Peak(312e12),
  "a100 pcie": Peak(312e12),
  "a800 sxm4": Peak(312e12),
  "a800 pcie": Peak(312e12),
  "l4": Peak(121e12),
  "l40": Peak(181e12),
  "l40s": Peak(362e12),
  "h20": Peak(148e12),
  "h100": Peak(989e12),
  "h100 pcie": Peak(756e12),
  "h100 nvl": Peak(835e12),
  "h800": Peak(989e12),
  "h800 pcie": Peak(756e12),
  "h200": Peak(989e12),
  "h200 nvl": Peak(835e12),
  "gh200": Peak(989e12),
  "b200": Peak(2250e12),
  "b300": Peak(2250e12),
  "b300 sxm6 ac": Peak(2250e12),
  "gb200": Peak(2500e12),
  "gb300": Peak(2500e12),
}
_MEMORY = re.compile(r" (\d+gb|hbm\w*)(?= |$)")


def _model(kind: str) -> str:
  """ "NVIDIA A100-SXM4-80GB" -> "a100 sxm4": without maker and memory."""
  kind = kind.lower().replace("-", " ").removeprefix("nvidia ")
  return _MEMORY.sub("", kind)


def peak_flops(device: Any) -> float | None:
  """Peak FLOP/s of one JAX device; None if it is not known (a CPU).

  A chip of two cores is one device (TPU v4, v5p) or two (v3, TPU7x).
  """
  peak = PEAK_FLOPS.get(_model(device.device_kind))
  if peak is None:
    return None
  cores = getattr(device, "num_cores", None) or peak.cores_of_device
  return peak.flops * min(cores, peak.cores) / peak.cores


def why_no_mfu(device: Any) -> str | None:
  """A line to print if the peak of an accelerator is not known."""
  if device.platform == "cpu" or peak_flops(device) is not None:
    return None
  return (
    f"mfu is not logged: the peak FLOP/s of {device.device_kind!r} are not"
    " known; add them to PEAK_FLOPS in hope_jax/analysis/flops.py"
  )


def count(function: Any, *args: Any) -> float:
  """FLOPs of `function(*args)`; args may be ShapeDtypeStructs."""
  return sum(by_scope(function, *args).values())


def by_scope(function: Any, *args: Any) -> Counter[str]:
  """FLOPs by scope: Linen modules and `jax.named_scope`s, joined by `/`."""
  return _count_jaxpr(jax.make_jaxpr(function)(*args).jaxpr, "")


def per_token(config: Config, params: Tree = None) -> float:
  """FLOPs of the forward and backward pass per token.

  Recomputation (remat, kernels) is not counted: it is the chip's work, not the
  model's.  `params` (shapes are enough) saves tracing the model's
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

  def total(params: Tree, tokens: jax.Array) -> jax.Array:
    return jnp.sum(forward(model, params, tokens).logits)

  return count(jax.grad(total), params, tokens) / length


def _count_jaxpr(jaxpr: Any, scope: str) -> Counter[str]:
  counts: Counter[str] = Counter()
  for equation in jaxpr.eqns:
    counts.update(_count_equation(equation, scope))
  return counts


def _count_equation(equation: Any, scope: str) -> Counter[str]:
  name, params = equation.primitive.name, equation.params
  scope = f"{scope}/{equation.source_info.name_stack}"
  if name in _PRODUCTS:
    return Counter({scope: _PRODUCTS[name](equation)})
  inner = [_count_jaxpr(jaxpr, scope) for jaxpr in _jaxprs(params)]
  if name == "cond":
    return max(inner, key=lambda counts: sum(counts.values()))
  total, times = sum(inner, Counter()), 1
  if name == "scan":
    times = params["length"]
  if name == "shard_map":
    axes = params.get("manual_axes") or params["mesh"].axis_names
    times = math.prod(params["mesh"].shape[a] for a in axes)
  if name == "pallas_call":
    grid = getattr(params.get("grid_mapping"), "grid", ())
    times = math.prod(n for n in grid if isinstance(n, int))
  return Counter({scope: times * n for scope, n in total.items()})


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


_PRODUCTS = {
  "dot_general": _dot_general,
  "conv_general_dilated": _convolution,
}
