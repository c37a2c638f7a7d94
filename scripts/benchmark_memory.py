"""Speed of one layer's memory against attention of equal width, and a floor.

python -m scripts.benchmark_memory [--lengths=2048,8192] [--chunks=16,64,256]

The sequence part of a layer alone: q, k, v and gates [B, H, T, ...] in, o out;
forward, and forward + backward (outer gradients of all inputs and of M_0).

  titans       the deep memory of Titans: chunk-start gradients, no erase
  hope         that of Hope: exact in the chunk, self-generated targets
  projections  Hope's adaptive k, v, eta, alpha, all boxes of a head
  linear_rule  one gated delta rule with momentum (`pallas_kernels`)
  attention    causal softmax attention, `jax.nn.dot_product_attention`

each in XLA, and as a kernel where there is one for this machine.  All variants
of a length take turns, so that other load on the machine affects all of them;
times are medians.  The floor is the time that the algorithm's FLOPs (jaxpr,
without recomputation) or its least bytes (inputs, outputs and their gradients
once) would take at the rates of a large matrix product and a large copy,
measured in the same run.  Passes that need more temporary memory than --gib are
left out.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from configs import _models
from experiments.lib import tables, timing
from hope_jax.analysis import flops
from hope_jax.config import MemoryConfig
from hope_jax.memory import deep, rules, self_modifying
from hope_jax.memory.architectures import Weights
from hope_jax.memory.norms import l2_normalize
from pallas_kernels.linear_rule import api

LAYERS = ("titans", "hope", "projections", "linear_rule", "attention")
KERNELS = {  # backend -> layers that have a kernel there
  "tpu": LAYERS[:-1],
  "gpu": ("linear_rule",),
}


class Tokens(NamedTuple):
  """q, k, v [B, H, T, K]; eta, alpha, beta: gates [B, H, T]."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  eta: jax.Array
  alpha: jax.Array
  beta: jax.Array


def make_tokens(batch: int, heads: int, length: int, dim: int) -> Tokens:
  """Random tokens; q and k of norm 1, gates as at a model's initialisation."""
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(x, (batch, heads, length, dim)) for x in keys)
  gate = lambda value: jnp.full((batch, heads, length), value, jnp.float32)
  return Tokens(
    l2_normalize(q), l2_normalize(k), v, gate(0.7), gate(0.999), gate(0.88)
  )


def initial_state(layer: str, heads: int, dim: int) -> Any:
  """M_0 as a layer is initialised; None where it has none."""
  key = jax.random.key(1)
  draw = lambda *shape: 0.1 * jax.random.normal(key, (heads, *shape))
  if layer == "projections":
    return self_modifying.Boxes(
      draw(4 * dim, dim), draw(2, dim, dim), draw(2, 1, dim)
    )
  if layer in ("titans", "hope"):
    return Weights(draw(dim, dim), draw(dim, dim))
  return None


def make_layer(
  layer: str, implementation: Any, chunk: int, remat: Any = "sqrt"
) -> Callable[[Any, Tokens], Any]:
  """(M_0, tokens) -> what the layer reads."""
  if layer == "attention":
    return lambda _, x: attention(x)
  if layer == "linear_rule":
    return lambda _, x: linear_rule(x, chunk, implementation, remat)
  group = _models.MEMORIES["titans" if layer == "titans" else "hope"]
  cfg = MemoryConfig(
    **group,
    chunk_length=chunk,
    projection_chunk_length=chunk,
    remat=remat,
    implementation=implementation,
  )

  def memory(initial: Any, x: Tokens) -> jax.Array:
    gates = rules.Gates(x.eta, x.alpha, x.beta)
    tokens = deep.Tokens(x.k, x.v, x.q, gates)
    return deep.run_memory(initial, tokens, cfg).outputs

  def projections(initial: Any, x: Tokens) -> Any:
    slow = self_modifying.Slow(x.k, x.v, x.q, x.eta, x.alpha, x.beta)
    return self_modifying.run_projections(initial, slow, cfg).outputs

  return projections if layer == "projections" else memory


def attention(x: Tokens) -> jax.Array:
  q, k, v = (y.swapaxes(1, 2) for y in (x.q, x.k, x.v))
  return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def linear_rule(x: Tokens, chunk: int, name: Any, remat: Any) -> Any:
  """A gated delta rule with momentum on a matrix memory."""
  batch, heads, _, dim = x.k.shape
  zero = jnp.zeros((batch, heads, dim, dim))
  return api.linear_rule(
    x.k,
    -x.v,
    weight=zero,
    momentum=zero,
    retention=x.alpha,
    momentum_decay=x.beta,
    step_size=x.eta,
    erase=x.eta * x.alpha,
    queries=x.q,
    chunk_length=chunk,
    implementation=name,
    checkpoint=remat,
  ).outputs


class Variant(NamedTuple):
  """A layer in one implementation at one chunk length (0: no chunks)."""

  layer: str
  implementation: str
  chunk: int


def variants(
  layers: Sequence[str], chunks: Sequence[int], backend: str
) -> list[Variant]:
  """All variants that this backend can run."""
  found = []
  for layer in layers:
    names = ["xla"]
    if layer in KERNELS.get(backend, ()):
      names.append(f"pallas_{backend}")
    for chunk in (0,) if layer == "attention" else chunks:
      found += [Variant(layer, name, chunk) for name in names]
  return found


def passes(run: Callable[[Any, Tokens], Any]) -> dict[str, Callable]:
  """Forward, and forward + backward, of (M_0, tokens)."""

  def total(initial: Any, x: Tokens) -> Any:
    return sum(jnp.sum(y) for y in jax.tree.leaves(run(initial, x)))

  return {"forward": run, "both": jax.value_and_grad(total, argnums=(0, 1))}


def size(tree: Any) -> int:
  """Bytes of all arrays."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Rates(NamedTuple):
  """FLOP/s of a large float32 matrix product, bytes/s of a large copy."""

  product: float
  copy: float


def measure_rates(width: int, rounds: int = 5) -> Rates:
  x = jnp.ones((width, width))
  y = jnp.ones((16 * width, width))
  calls = {
    "product": functools.partial(jax.jit(jnp.dot), x, x),
    "copy": functools.partial(jax.jit(lambda y: -y), y),
  }
  seconds = timing.medians(timing.in_turn(calls, rounds))
  product = 2.0 * width**3 / seconds["product"]
  return Rates(product, 2.0 * size(y) / seconds["copy"])


def floor_seconds(variant: Variant, x: Tokens, rates: Rates) -> dict[str, Any]:
  """The floor of each pass (module docstring)."""
  run = make_layer(variant.layer, "xla", variant.chunk, "none")
  initial = initial_state(variant.layer, x.q.shape[1], x.q.shape[-1])
  floor = {}
  for name, function in passes(run).items():
    outputs = jax.eval_shape(run, initial, x)
    least = size((initial, x, outputs))
    if name == "both":  # and all gradients
      least *= 2
    work = flops.count(function, initial, x)
    floor[name] = max(work / rates.product, least / rates.copy)
  return floor


def compile_variant(
  variant: Variant, x: Tokens, limit: float
) -> dict[str, Callable[[], Any]]:
  """The passes that fit into `limit` bytes, compiled, with their arguments."""
  run = make_layer(*variant)
  initial = initial_state(variant.layer, x.q.shape[1], x.q.shape[-1])
  calls = {}
  for name, function in passes(run).items():
    compiled = jax.jit(function).lower(initial, x).compile()
    analysis = compiled.memory_analysis()
    if analysis is None or analysis.temp_size_in_bytes <= limit:
      calls[name] = functools.partial(compiled, initial, x)
  return calls


def measure(length: int, flags: argparse.Namespace, rates: Rates) -> list[Any]:
  """A line for every variant at one length."""
  batch = max(1, flags.tokens // length)
  x = make_tokens(batch, flags.heads, length, flags.dim)
  backend = jax.default_backend()
  chosen = variants(flags.layers, flags.chunks, backend)
  limit = flags.gib * 2**30
  calls = {
    (variant, name): call
    for variant in chosen
    for name, call in compile_variant(variant, x, limit).items()
  }
  seconds = timing.medians(timing.in_turn(calls, flags.rounds))
  tokens = batch * length
  lines = []
  for variant in chosen:
    line = {
      "layer": variant.layer,
      "implementation": variant.implementation,
      "B x T": f"{batch} x {length:,}",
      "C": str(variant.chunk or "-"),
    }
    floor = floor_seconds(variant, x, rates)
    for name, title in (("forward", "forward"), ("both", "fwd + bwd")):
      taken = seconds.get((variant, name))
      base = seconds.get((Variant("attention", "xla", 0), name))
      line[f"{title} ms"] = "memory" if taken is None else f"{taken * 1e3:,.1f}"
      if taken is not None:
        line[f"{title}, of floor"] = f"{taken / floor[name]:.1f}"
        if base is not None:
          line[f"{title}, of attention"] = f"{taken / base:.2f}"
        if name == "both":
          line["tokens/s"] = f"{tokens / taken:,.0f}"
    lines.append(line)
  return lines


def integers(text: str) -> list[int]:
  return [int(word) for word in text.split(",")]


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser("python -m scripts.benchmark_memory")
  parser.add_argument("--layers", default=",".join(LAYERS))
  parser.add_argument("--lengths", type=integers, default=[2048, 8192])
  parser.add_argument("--chunks", type=integers, default=[16, 64, 256])
  parser.add_argument("--tokens", type=int, default=8192, help="of a batch")
  parser.add_argument("--heads", type=int, default=4)
  parser.add_argument("--dim", type=int, default=64, help="of a head")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--gib", type=float, default=12.0)
  flags = parser.parse_args(argv)
  flags.layers = flags.layers.split(",")
  if unknown := set(flags.layers) - set(LAYERS):
    names = ", ".join(LAYERS)
    parser.error(f"--layers: {', '.join(unknown)} is not one of {names}")
  rates = measure_rates(2048)
  lines = []
  for length in flags.lengths:
    lines += measure(length, flags, rates)
  print(tables.markdown(lines))
  print(
    f"{flags.heads} heads of {flags.dim}, float32, median of {flags.rounds} in"
    f" turn; product {rates.product / 1e9:,.0f} GFLOP/s, copy"
    f" {rates.copy / 1e9:,.1f} GB/s; {timing.machine()},"
    f" {jax.devices()[0].device_kind}, jax {jax.__version__}"
  )


if __name__ == "__main__":
  main()
