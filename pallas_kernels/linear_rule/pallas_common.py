"""What the kernels share: one chunk of one head, and the way in and out.

Dimensions: B batch, H heads, T tokens, G groups, n chunks of a group, C chunk
length, K input width, E output width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_rule import chunk as chunk_lib
from pallas_kernels.linear_rule import reference, tuning

Read = reference.Read
LinearRuleOutput = reference.LinearRuleOutput


class State(NamedTuple):
  """weight and momentum (None without), [..., E, K]."""

  weight: Any
  momentum: Any


class Tokens(NamedTuple):
  """x, queries (None: nothing is read) [..., C, K], u [..., C, E].

  rates: by name, [..., C] in float32; also `reset`, 0 or 1.
  """

  x: Any
  u: Any
  queries: Any
  rates: Any


class Static(NamedTuple):
  """What a kernel is compiled for."""

  read: Read
  num_tokens: int
  blocks: tuning.BlockSizes
  exact: chunk_lib.Exact
  interpret: Any


class Kernels(NamedTuple):
  """A backend's two calls, on tokens [B H, G, n, C, ...], states [B H, ...].

  forward(tokens, state, static, save=) -> (outputs, final state, the states at
    the groups' starts, [B H, G, ...], or None);
  backward(tokens, saved, d_outputs, d_final, static) -> (d_tokens, d_state).
  precision: of the products that must be exact.
  """

  forward: Callable
  backward: Callable
  precision: Any = "highest"


def run(
  kernels: Kernels,
  blocks: tuning.BlockSizes,
  x: jax.Array,
  u: jax.Array,
  *,
  weight: jax.Array,
  momentum: jax.Array | None,
  queries: jax.Array | None,
  read: Read = "pre",
  interpret: Any,
  **rates: jax.Array | None,
) -> LinearRuleOutput:
  """`api.linear_rule` by a backend's kernels; everything in float32."""
  batch, heads, num_tokens, _ = x.shape
  padding = blocks.num_tokens - num_tokens

  def group(array: jax.Array) -> jax.Array:
    """[B, H, T, ...] -> [B H, G, n, C, ...], filled up with zeros."""
    array = array.reshape(batch * heads, num_tokens, *array.shape[3:])
    if padding:
      widths = [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2)
      array = jnp.pad(array, widths)
    shape = blocks.steps, blocks.chunks, blocks.chunk_length
    return array.reshape(batch * heads, *shape, *array.shape[2:])

  tokens = Tokens(
    x=group(x),
    u=group(u),
    queries=None if queries is None else group(queries),
    rates={
      name: group(rate.astype(jnp.float32))
      for name, rate in rates.items()
      if rate is not None
    },
  )
  state = jax.tree.map(
    lambda leaf: leaf.reshape(-1, *leaf.shape[2:]).astype(jnp.float32),
    State(weight, momentum),
  )
  precision = "highest" if interpret else kernels.precision
  exact = chunk_lib.Exact(precision, in_kernel=True)
  static = Static(read, num_tokens, blocks, exact, interpret)
  outputs, final = _differentiable(tokens, state, kernels, static)
  if outputs is not None:
    outputs = outputs.reshape(batch, heads, -1, u.shape[-1])[:, :, :num_tokens]
  final = jax.tree.map(
    lambda leaf: leaf.reshape(batch, heads, *leaf.shape[1:]), final
  )
  return LinearRuleOutput(outputs, *final)


def _values(tokens, state, kernels, static):
  return kernels.forward(tokens, state, static, save=False)[:2]


def _forward(tokens, state, kernels, static):
  outputs, final, saved = kernels.forward(tokens, state, static, save=True)
  return (outputs, final), (tokens, saved)


def _backward(kernels, static, residuals, cotangents):
  return kernels.backward(*residuals, *cotangents, static)


_differentiable: Any = jax.custom_vjp(_values, nondiff_argnums=(2, 3))
_differentiable.defvjp(_forward, _backward)


# -------------------------------------------------------------- in a kernel


def run_chunk(
  state: State,
  tokens: Tokens,
  index: jax.Array,
  static: Static,
  *,
  with_read: bool = True,
) -> tuple[Any, State]:
  """One chunk of one head, the `index`-th: (what is read, the state after)."""
  decays = chunk_lib.chunk_decays(
    tokens.rates["retention"],
    tokens.rates.get("momentum_decay"),
    live=_live(index, tokens.x.shape[0], static),
    reset=tokens.rates.get("reset"),
    read=static.read if with_read else "pre",
    exact=static.exact,
  )
  out = chunk_lib.chunk_rule(
    tokens.x,
    tokens.u,
    weight=state.weight,
    momentum=state.momentum,
    decays=decays,
    learn_rate=tokens.rates["learn_rate"],
    erase=tokens.rates.get("erase"),
    queries=tokens.queries if with_read else None,
    read=static.read,
    exact=static.exact,
  )
  return out.outputs, State(out.weight, out.momentum)


def _live(index: jax.Array, length: int, static: Static) -> jax.Array | None:
  """Which tokens of a chunk exist, [C]; None where all always do."""
  if static.blocks.num_tokens == static.num_tokens:
    return None
  place = jax.lax.broadcasted_iota(jnp.int32, (length,), 0)
  return index * length + place < static.num_tokens


def chunk_vjp(
  state: State,
  tokens: Tokens,
  d_outputs: jax.Array | None,
  d_after: State,
  index: jax.Array,
  static: Static,
) -> tuple[State, Tokens]:
  """Cotangents of `run_chunk`'s state and tokens."""
  _, vjp = jax.vjp(
    lambda state, tokens: run_chunk(state, tokens, index, static), state, tokens
  )
  return vjp(
    (jax.tree.map(lambda d: d.astype(jnp.float32), d_outputs), d_after)
  )


def load(refs: Any, index: Any = ...) -> Any:
  """What stands at an index of every ref."""
  return jax.tree.map(lambda ref: ref[index], refs)


def store(refs: Any, index: Any, values: Any) -> None:
  """Writes values to an index of every ref, in its dtype."""

  def write(ref, value):
    ref[index] = value.astype(ref.dtype)

  jax.tree.map(write, refs, values)


def like(tree: Any, *, axes: tuple[int, ...] = ()) -> Any:
  """Shapes and dtypes of arrays, with more axes after the first."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((x.shape[0], *axes, *x.shape[1:]), x.dtype),
    tree,
  )
