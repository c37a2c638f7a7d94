"""Slow parameters: an array with its logical axes, its role and its owner.

Linen keeps a parameter in a box until `nn.unbox`; the box says how it is laid
out on a mesh (`training/sharding.py` maps logical axes to mesh axes), how an
optimizer treats it (`optim/roles.py`), and which component of the model counts
it as its own (`analysis/costs.py`).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
from flax.typing import ArrayPytree as Tree

from hope_jax.optim.roles import Kind, Role

Axes = tuple[str | None, ...]
LAYERS = "layers"  # the logical axis of stacked layers


class Parameter(nn.LogicallyPartitioned):
  """The box of a parameter.

  Attributes:
    role: see `optim/roles.py`.
    owner: names of components, see `kinds`.
  """

  role: Role = flax.struct.field(default="weight", pytree_node=False)
  owner: tuple[str, ...] = flax.struct.field(default=(), pytree_node=False)


def boxed(
  init: Callable[..., Tree],
  axes: Axes,
  role: Role = "weight",
  owner: tuple[str, ...] = (),
) -> Callable[..., Tree]:
  """The initializer `init`, with its array put into a `Parameter`."""

  def make(*args: Any, **kwargs: Any) -> Parameter:
    return Parameter(init(*args, **kwargs), axes, role=role, owner=owner)

  return make


def parameter(
  module: nn.Module,
  name: str,
  init: Callable[..., Tree],
  shape: tuple[int, ...],
  axes: Axes,
  *,
  role: Role = "weight",
  owner: tuple[str, ...] = (),
) -> Tree:
  """The parameter `name` of `module`, float32, from `init(key, shape)`."""
  return module.param(name, boxed(init, axes, role, owner), shape)


# The component that owns a parameter without an explicit owner, by the name of
# a module that contains it.
_PLACES = {
  "mixer": "projections",
  "norm_mixer": "projections",
  "ffn": "ffn",
  "norm_ffn": "ffn",
}


def kinds(params: Tree) -> Tree:
  """`Kind` of every boxed parameter, as a tree like the parameters.

  Without an explicit owner a parameter belongs to the part of the block that
  contains it, `projections` (the sequence layer) or `ffn`, or outside of blocks
  to the `embedding`.
  """

  def kind(path: tuple[Tree, ...], box: Parameter) -> Kind:
    names = {str(getattr(key, "key", key)) for key in path}
    places = [owner for name, owner in _PLACES.items() if name in names]
    owner = box.owner or (places[0] if places else "embedding",)
    if isinstance(owner, str):
      owner = (owner,)
    ndim = box.value.ndim - (LAYERS in box.names)
    return Kind(box.role, owner, ndim)

  return jax.tree_util.tree_map_with_path(
    kind, params, is_leaf=lambda x: isinstance(x, Parameter)
  )
