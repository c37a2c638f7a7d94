"""What the backward pass of one memory layer keeps, against sequence length.

python -m scripts.backward_memory [--plot=FILE.png]

One head of Titans at the paper's sizes (head dim and hidden 128, chunks of 64
tokens), one sequence, for each policy of `checkpointed_scan`: the saved states
(weights and momentum, counted in the residuals of the gradient) and the
temporary memory of the compiled gradient, inputs and outputs not included.
Nothing is run, only compiled.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.lib import plots, tables
from hope_jax.config import MemoryConfig
from hope_jax.memory import deep
from hope_jax.memory.architectures import Weights
from hope_jax.memory.rules import Gates

DIM, CHUNK = 128, 64
LENGTHS = tuple(1024 * 2**i for i in range(7))  # to 64K
POLICIES = ("chunk", "sqrt")


def outputs(args: Any, policy: Any) -> jax.Array:
  """One memory along [1, 1, T, 128] of keys, values, queries."""
  initial, *tokens = args
  cfg = MemoryConfig(
    adaptive=(),
    target="shared",
    delta_rule="none",
    chunk_length=CHUNK,
    remat=policy,
  )
  return deep.run_memory(initial, deep.Tokens(*tokens), cfg).outputs


def arguments_of(length: int) -> Any:
  """Shapes of the arguments at T = `length`; nothing is allocated."""
  array: Any = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  token = array(1, 1, length, DIM)
  gate = array(1, 1, length)
  initial = Weights(array(1, DIM, DIM), array(1, DIM, DIM))
  return initial, token, token, token, Gates(gate, gate, gate)


def saved_states(length: int, policy: str) -> float:
  """States (both layers' weights and momenta) among the residuals."""
  run = functools.partial(outputs, policy=policy)
  residuals = jax.eval_shape(
    lambda args: jax.vjp(run, args)[1], arguments_of(length)
  )
  sizes = [
    leaf.size
    for leaf in jax.tree.leaves(residuals)
    if leaf.shape[-2:] == (DIM, DIM)
  ]
  return sum(sizes) / (4 * DIM * DIM)


def temporary_bytes(length: int, policy: str) -> int:
  """Peak temporary memory of the compiled gradient."""
  loss = lambda args: jnp.sum(jnp.square(outputs(args, policy)))
  compiled = jax.jit(jax.grad(loss)).lower(arguments_of(length)).compile()
  analysis = compiled.memory_analysis()
  assert analysis is not None
  return analysis.temp_size_in_bytes


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser("python -m scripts.backward_memory")
  parser.add_argument("--plot", type=plots.output, help="PNG file")
  flags = parser.parse_args(argv)
  lines, curves = [], {policy: [] for policy in POLICIES}
  for length in LENGTHS:
    line = {"tokens": f"{length:,}", "chunks": f"{length // CHUNK:,}"}
    for policy in POLICIES:
      states = saved_states(length, policy)
      megabytes = temporary_bytes(length, policy) / 2**20
      line[f"states, {policy}"] = f"{states:,.0f}"
      line[f"MiB, {policy}"] = f"{megabytes:,.1f}"
      curves[policy].append(states)
    lines.append(line)
  print(tables.markdown(lines))
  if flags.plot:
    plots.lines(
      flags.plot,
      {policy: (LENGTHS, states) for policy, states in curves.items()},
      title="Saved states of one memory layer's backward pass",
      xlabel="tokens",
      ylabel="states",
    )


if __name__ == "__main__":
  main()
