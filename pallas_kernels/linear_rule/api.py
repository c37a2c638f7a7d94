"""One linear fast weight that learns over a sequence (spec 02, section 1).

The primitive of every recurrent layer of this project: linear attention,
RetNet, Mamba2, DeltaNet, Titans and the layers of deep memories are choices of
its arguments (the table of spec 02; `test_linear_rule.py` writes them out).

Dimensions: B batch, H heads, T tokens, C chunk length, K input width, E output
width. The paper's symbols: alpha = retention, beta = momentum_decay,
eta = learn_rate, delta = erase, W = weight, S = momentum, u = output error.

The kernels are imported where they are chosen: Pallas takes a third of a second
that a process on a CPU need not wait for.
"""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from absl import logging

from pallas_kernels.common import scan
from pallas_kernels.linear_rule import chunked, reference

Implementation = Literal["reference", "chunked", "pallas_tpu", "pallas_gpu"]
LinearRuleOutput = reference.LinearRuleOutput
Read = reference.Read


def linear_rule(
  x: jax.Array,
  u: jax.Array,
  *,
  weight: jax.Array,
  momentum: jax.Array | None,
  retention: jax.Array,
  momentum_decay: jax.Array | None,
  learn_rate: jax.Array,
  erase: jax.Array | None,
  queries: jax.Array | None = None,
  read: Read = "pre",
  reset: jax.Array | None = None,
  chunk_length: int,
  implementation: Implementation | None = None,
  checkpoint: scan.CheckpointPolicy = "sqrt",
) -> LinearRuleOutput:
  """Updates a fast weight with every token, reads it with every query.

      W, S <- 0                                            where reset_t
      S_t = beta_t S_{t-1} - eta_t u_t x_t^T
      W_t = W_{t-1} (alpha_t I - delta_t x_t x_t^T) + S_t
      y_t = W_{t-1} q_t  (read = "pre")  or  W_t q_t  (read = "post")

  The result does not depend on `chunk_length`.  Differentiable in every float
  argument, whatever the size of retention and momentum_decay: values and
  derivatives keep their digits down to exact zeros.

  Args:
    x: inputs x_t, [B, H, T, K].
    u: errors u_t = dL/dy_t, [B, H, T, E], not a function of W inside a chunk
      (or use chunk_length tokens per call).
    weight: initial W, [B, H, E, K].
    momentum: initial S, [B, H, E, K]; None: S_t = -eta_t u_t x_t^T.
    retention: alpha_t, [B, H, T].
    momentum_decay: beta_t, [B, H, T]; None exactly if momentum is None.
    learn_rate: eta_t, [B, H, T].
    erase: delta_t, [B, H, T]; None: 0, and the cheaper form without a solve.
    queries: q_t, [B, H, T, K]; None: no outputs.
    read: whether q_t sees the state before or after token t's write.
    reset: bool, [B, H, T]: forget everything before this token.
    chunk_length: C, tokens that are solved at once ("pallas_gpu": at most).
    implementation: "reference" (token loop), "chunked" (XLA), "pallas_tpu",
      "pallas_gpu"; None: the best that can run on the default backend.
    checkpoint: what "chunked" recomputes in its backward pass, see `scan.py`.

  Returns:
    outputs [B, H, T, E] in u's dtype, or None without queries; the final
    weight and momentum, float32 (float64 if they were).

  The kernels are not partitioned automatically: on more than one device call
  them inside `jax.shard_map(..., check_vma=False)`.

  Raises:
    ValueError: a shape, an option or a combination of arguments is wrong, or
      the implementation is of another platform (when it is compiled).
    NotImplementedError: a kernel cannot do these dtypes or sizes.
  """
  arguments: dict[str, Any] = dict(
    weight=weight,
    momentum=momentum,
    retention=retention,
    momentum_decay=momentum_decay,
    learn_rate=learn_rate,
    erase=erase,
    queries=queries,
    reset=reset,
  )
  _validate(x, u, chunk_length, **arguments)
  _validate_choice("read", read, Read)
  _validate_choice("checkpoint", checkpoint, scan.CheckpointPolicy)
  dtype = reference.state_dtype(x, u, arguments)
  arguments |= dict(read=read)
  if implementation is None:
    implementation = _best_implementation(dtype, x.shape[-1], u.shape[-1])
  _validate_choice("implementation", implementation, Implementation)
  if implementation == "reference":
    return reference.linear_rule_reference(x, u, **arguments)
  arguments |= dict(chunk_length=chunk_length)
  if implementation == "chunked":
    arguments |= dict(checkpoint=checkpoint)
    return chunked.linear_rule_chunked(x, u, **arguments)
  if dtype != jnp.float32:
    raise NotImplementedError(
      f'{implementation!r} computes in float32, not {dtype}: use "chunked".'
    )
  if implementation == "pallas_tpu":
    from pallas_kernels.linear_rule import pallas_tpu

    return pallas_tpu.linear_rule_tpu(x, u, **arguments)
  from pallas_kernels.linear_rule import pallas_gpu

  return pallas_gpu.linear_rule_gpu(x, u, **arguments)


def _best_implementation(
  dtype: jnp.dtype, key_dim: int, value_dim: int
) -> Implementation:
  backend, best = jax.default_backend(), "chunked"
  if dtype == jnp.float32 and backend == "tpu":
    best = "pallas_tpu"
  if dtype == jnp.float32 and backend == "gpu":
    from pallas_kernels.linear_rule import pallas_gpu

    can_tile = pallas_gpu.can_tile(key_dim, value_dim)
    best = "pallas_gpu" if can_tile else "chunked"
  _log_choice(best)
  return best


@functools.cache
def _log_choice(name: str) -> None:
  logging.info(f'linear_rule: implementation=None uses "{name}".')


def _validate_choice(name, value, choices):
  if value not in get_args(choices):
    options = ", ".join(map(repr, get_args(choices)))
    raise ValueError(f"{name}={value!r} is not one of {options}.")


def _validate(x, u, chunk_length, **arguments):
  """Raises ValueError unless all shapes and optional arguments fit."""
  if chunk_length < 1:
    raise ValueError(f"{chunk_length=} must be at least 1.")
  if x.ndim != 4 or 0 in x.shape:
    raise ValueError(f"{x.shape=} must be [B, H, T, K], none of them 0.")
  if u.ndim != 4 or u.shape[:3] != x.shape[:3] or 0 in u.shape:
    raise ValueError(f"{u.shape=} must be [B, H, T, E] for {x.shape=}.")
  batch, heads, tokens, key_dim = x.shape
  state_shape = (batch, heads, u.shape[-1], key_dim)
  token_shape = (batch, heads, tokens)
  expected = dict(
    weight=state_shape,
    momentum=state_shape,
    retention=token_shape,
    momentum_decay=token_shape,
    learn_rate=token_shape,
    erase=token_shape,
    queries=x.shape,
    reset=token_shape,
  )
  optional = {"momentum", "momentum_decay", "erase", "queries", "reset"}
  for name, shape in expected.items():
    value = arguments[name]
    if value is None and name in optional:
      continue
    if value is None or value.shape != shape:
      found = None if value is None else value.shape
      raise ValueError(
        f"{name}.shape={found} must be {shape} for {x.shape=}, {u.shape=}."
      )
  if (arguments["momentum"] is None) != (arguments["momentum_decay"] is None):
    raise ValueError("momentum and momentum_decay must both be given or None.")
  reset = arguments["reset"]
  if reset is not None and reset.dtype != jnp.bool_:
    raise ValueError(f"{reset.dtype=} must be bool.")
