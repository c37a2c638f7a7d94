"""One linear fast weight that learns over a sequence.

The primitive of every recurrent layer of this project: linear attention,
RetNet, Mamba2, DeltaNet, Titans and the layers of deep memories are choices of
its arguments (docs/equations.md has the table, `test_models.py` writes them
out).

Dimensions: B batch, H heads, T tokens, C chunk length, K input width, E output
width. The paper's symbols: alpha = retention, beta = momentum_decay,
eta' = step_size, delta = erase, W = weight, S = momentum, u = output error.

The kernels are imported only when they are chosen: importing Pallas takes a
third of a second, which a process on a CPU need not wait for.  They are not
partitioned automatically: on more than one device call them inside
`jax.shard_map(..., check_vma=False)`.
"""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from absl import logging

from pallas_kernels.common import scan
from pallas_kernels.linear_rule import reference, xla
from pallas_kernels.linear_rule.reference import (
  LinearRuleOutput,
  Rates,
  Read,
  State,
  Tokens,
)

Implementation = Literal[
  "reference", "xla", "pallas_tpu", "pallas_gpu", "pallas_interpret"
]
Arguments = tuple[Tokens, Rates, State]


class Options(NamedTuple):
  """The arguments of `linear_rule` that are not arrays."""

  read: Read
  chunk_length: int
  checkpoint: scan.CheckpointPolicy


def linear_rule(
  x: jax.Array,
  u: jax.Array,
  *,
  weight: jax.Array,
  momentum: jax.Array | None,
  retention: jax.Array,
  momentum_decay: jax.Array | None,
  step_size: jax.Array,
  erase: jax.Array | None,
  queries: jax.Array | None = None,
  read: Read = "pre",
  reset: jax.Array | None = None,
  chunk_length: int,
  implementation: Implementation | None = None,
  checkpoint: scan.CheckpointPolicy = "sqrt",
) -> LinearRuleOutput:
  """Updates a fast weight with every token and reads it with every query.

    S_t = beta_t S_{t-1} - eta'_t u_t x_t^T
    W_t = W_{t-1} (alpha_t I - delta_t x_t x_t^T) + S_t
    y_t = W_{t-1} q_t  (read = "pre")  or  W_t q_t  (read = "post")

  Values and derivatives in every float argument do not depend on
  `chunk_length`, and stay accurate for decays down to exact zeros.

  Args:
    x: inputs x_t, [B, H, T, K].
    u: errors u_t = dL/dy_t, [B, H, T, E], which do not depend on W in a chunk.
    weight: initial W, [B, H, E, K].
    momentum: initial S, [B, H, E, K]; None: S_t = -eta'_t u_t x_t^T.
    retention, step_size: alpha_t, eta'_t, [B, H, T].
    momentum_decay: beta_t, [B, H, T]; None exactly if momentum is None.
    erase: delta_t, [B, H, T]; None: 0, and the cheaper form without a solve.
    queries: q_t, [B, H, T, K]; None: no outputs.
    read: whether q_t sees the state before or after token t's write.
    reset: bool, [B, H, T]: forget everything before this token.
    chunk_length: C, tokens that are solved at once ("pallas_gpu" takes a power
      of 2 from 16 to 64).
    implementation: None: the best that can run on the default backend;
      "pallas_interpret": the TPU kernels on any backend, slowly.
    checkpoint: what "xla" recomputes in its backward pass, see `scan.py`.

  Returns:
    outputs [B, H, T, E] in u's dtype, or None without queries; the final
    weight and momentum, float32 (float64 if they were).

  Raises:
    ValueError: a shape, an option or a combination of arguments is wrong, or
      the implementation is for another platform (raised at compilation).
    NotImplementedError: a kernel cannot do these dtypes or sizes.
  """
  rates = Rates(retention, momentum_decay, step_size, erase, reset)
  arguments = Tokens(x, u, queries), rates, State(weight, momentum)
  options = Options(read, chunk_length, checkpoint)
  _validate(*arguments)
  _validate_options(options)
  return _run(implementation, arguments, options)


def _run(
  name: Implementation | None, arguments: Arguments, options: Options
) -> LinearRuleOutput:
  """Dispatches to the implementation, or to the best one."""
  dtype = reference.state_dtype(arguments)
  if name is None:
    name = _best_implementation(dtype, arguments[0])
  _validate_choice("implementation", name, Implementation)
  if name == "reference":
    return reference.linear_rule_reference(*arguments, read=options.read)
  if name == "xla":
    return xla.linear_rule_xla(*arguments, **options._asdict())
  if dtype != jnp.float32:
    raise NotImplementedError(
      f'{name!r} computes in float32, not {dtype}: use "xla".'
    )
  run: Any
  if name == "pallas_gpu":
    from pallas_kernels.linear_rule.pallas_gpu import linear_rule_gpu as run
  else:
    from pallas_kernels.linear_rule.pallas_tpu import linear_rule_tpu

    is_tpu = name == "pallas_tpu"
    run = functools.partial(linear_rule_tpu, interpret=not is_tpu)
  return run(*arguments, read=options.read, chunk_length=options.chunk_length)


def _best_implementation(dtype: jnp.dtype, tokens: Tokens) -> Implementation:
  backend, best = jax.default_backend(), "xla"
  if dtype == jnp.float32 and backend == "tpu":
    best = "pallas_tpu"
  if dtype == jnp.float32 and backend == "gpu":
    from pallas_kernels.linear_rule import pallas_gpu

    can_tile = pallas_gpu.can_tile(tokens.x.shape[-1], tokens.u.shape[-1])
    best = "pallas_gpu" if can_tile else "xla"
  _log_choice(best)
  return best


@functools.cache
def _log_choice(name: str) -> None:
  logging.info(f'linear_rule: implementation=None uses "{name}".')


def _validate_options(options: Options) -> None:
  if options.chunk_length < 1:
    raise ValueError(f"chunk_length={options.chunk_length} must be at least 1.")
  _validate_choice("read", options.read, Read)
  _validate_choice("checkpoint", options.checkpoint, scan.CheckpointPolicy)


def _validate_choice(name: str, value: Any, choices: Any) -> None:
  if value not in get_args(choices):
    known = ", ".join(map(repr, get_args(choices)))
    raise ValueError(f"{name}={value!r} is not one of {known}.")


def _validate(tokens: Tokens, rates: Rates, state: State) -> None:
  """Raises ValueError unless all shapes and optional arguments fit."""
  x, u = tokens.x, tokens.u
  if x.ndim != 4 or 0 in x.shape:
    raise ValueError(f"{x.shape=} must be [B, H, T, K], none of them 0.")
  if u.ndim != 4 or u.shape[:3] != x.shape[:3] or 0 in u.shape:
    raise ValueError(f"{u.shape=} must be [B, H, T, E] for {x.shape=}.")
  state_shape = (*x.shape[:2], u.shape[-1], x.shape[-1])
  expected = {
    "queries": x.shape,
    **dict.fromkeys(State._fields, state_shape),
    **dict.fromkeys(Rates._fields, x.shape[:3]),
  }
  given = tokens._asdict() | rates._asdict() | state._asdict()
  optional = {"momentum", "momentum_decay", "erase", "queries", "reset"}
  for name, shape in expected.items():
    value = given[name]
    if value is None and name in optional:
      continue
    if value is None or value.shape != shape:
      found = None if value is None else value.shape
      raise ValueError(
        f"{name}.shape={found} must be {shape} for {x.shape=}, {u.shape=}."
      )
  if (state.momentum is None) != (rates.momentum_decay is None):
    raise ValueError("momentum and momentum_decay must both be given or None.")
  reset = rates.reset
  if reset is not None and reset.dtype != jnp.bool_:
    raise ValueError(f"{reset.dtype=} must be bool.")
