"""What the memories do inside the sequence, as flat scalars to log.

Models sow scalars into the collection "dynamics" when it is mutable.  One
separately jitted forward pass collects them, so that training steps never
pay for them.
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import ArrayPytree as Tree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hope_jax.config import Config
from hope_jax.models.language_model import LanguageModel

# Path components that say nothing to a reader.
_SILENT = ("blocks", "mixer")


def build(config: Config, mesh: Mesh) -> Callable[[Any, Any], Any]:
  """Jitted (params, batch) -> the sown tree; call it inside the mesh."""
  model = LanguageModel(config.model)

  def collect(params: Tree, batch: dict[str, jax.Array]) -> Any:
    _, sown = model.apply(
      {"params": params},
      batch["tokens"],
      documents=batch.get("segments"),
      mutable=["dynamics"],
    )
    # Leaves [layers, ...]: one number a layer.
    return jax.tree.map(
      lambda x: jnp.mean(x.reshape(x.shape[0], -1), axis=1),
      sown.get("dynamics", {}),
    )

  return jax.jit(collect, out_shardings=NamedSharding(mesh, PartitionSpec()))


def flatten(sown: Tree) -> dict[str, float]:
  """blocks/mixer/memory/learn_rate [layers] ->
  dynamics/layer_0/memory/learn_rate, dynamics/layer_1/... ."""
  flat = {}
  for path, values in jax.tree_util.tree_leaves_with_path(sown):
    names = [key.key for key in path if hasattr(key, "key")]
    shown = [name for name in names if name not in _SILENT]
    tail = "/".join(shown).replace(".", "/")
    for layer, value in enumerate(np.asarray(values)):
      flat[f"dynamics/layer_{layer}/{tail}"] = float(value)
  return flat


def median_over_layers(
  flat: dict[str, float], quantity: str
) -> dict[str, float]:
  """{"dynamics/layer_0/memory/learn_rate": ...} -> {"memory": median}.

  A level is named by the last part of its path: memory, gate, cms_0 ...
  """
  by_level: dict[str, list[float]] = {}
  for name, value in flat.items():
    *_, level, last = name.split("/")
    if last == quantity:
      by_level.setdefault(level, []).append(value)
  return {
    level: statistics.median(values) for level, values in by_level.items()
  }
