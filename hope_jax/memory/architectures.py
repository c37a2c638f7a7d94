"""A memory's network, a residual MLP (eq. 89) or a matrix, at one state.

  mlp     M(x) = x + W1 act(W2 x)
  matrix  M(x) = W1 x

W = M_0 + D, where M_0 is the learned start (slow, shared by all sequences) and
D the fast difference of each sequence.

Legend: B batch, H heads, C tokens, K key dim, F hidden, E output dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}


class Weights(NamedTuple):
  """One value per layer: hidden [..., F, K] (None: matrix), output [..., E, F].

  Also holds other values per layer: momenta, inputs, shapes.
  """

  hidden: Tree
  output: Tree


class Trace(NamedTuple):
  """A forward pass: the layers' inputs, act'(z) and the outputs."""

  inputs: Weights
  slope: jax.Array | None
  outputs: jax.Array


def whole(initial: Tree, difference: Tree) -> Tree:
  """W = M_0 + D, with M_0 shared [H, ...] or copied per sequence [B, H, ...].

  With `initial` None the rule acts on W itself, and `difference` is W.
  """
  if initial is None:
    return difference

  def add(m, d):
    return (m if m.ndim == d.ndim else m[None]) + d

  return jax.tree.map(add, initial, difference)


def apply(x: jax.Array, weight: jax.Array) -> jax.Array:
  """x W^T for x [..., C, K], W [..., F, K]; W may lack the leading axes."""
  return jnp.einsum("...CK,...FK->...CF", x, weight)


def activate(z: jax.Array, activation: str) -> tuple[jax.Array, jax.Array]:
  """act(z) and act'(z)."""
  return jax.jvp(ACTIVATIONS[activation], (z,), (jnp.ones_like(z),))


def forward(weights: Weights, x: jax.Array, activation: str) -> Trace:
  """M(x) for x [B, H, C, K], with weights per sequence or shared."""
  if weights.hidden is None:
    return Trace(Weights(None, x), None, apply(x, weights.output))
  features, slope = activate(apply(x, weights.hidden), activation)
  outputs = x + apply(features, weights.output)
  return Trace(Weights(x, features), slope, outputs)


def hidden_error(
  output_weight: jax.Array, error: jax.Array, slope: jax.Array
) -> jax.Array:
  """Error of the hidden layer, (W1^T error) * act'(z): [..., C, F]."""
  back = jnp.einsum("...CE,...EF->...CF", error, output_weight)
  return back * slope
