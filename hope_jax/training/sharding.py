"""The device mesh, and where every array lives on it.

Mesh axes: `data` (copies of the model), `fsdp` (parameters split over the
batch's devices) and `tensor` (heads, hidden width and vocabulary split).
Models name their axes logically; RULES maps these names to mesh axes.
"""

import contextlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.linen import spmd
from flax.typing import ArrayPytree as Tree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hope_jax.config import Config, ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
RULES = (
  ("batch", BATCH_AXES),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("mlp", "tensor"),
  ("vocab", "tensor"),
)


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
  """A mesh over all devices; an axis of -1 takes what the others leave."""
  devices = jax.devices() if devices is None else devices
  shape = [config.data, config.fsdp, config.tensor]
  given = int(np.prod([n for n in shape if n != -1]))
  sizes = dict(zip(AXES, shape, strict=True))
  if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
    raise ConfigError(f"mesh={sizes}: sizes are positive, or one is -1")
  if (-1 in shape and len(devices) % given) or (
    -1 not in shape and len(devices) != given
  ):
    raise ConfigError(f"mesh={sizes} does not fit {len(devices)} devices")
  shape = [len(devices) // given if n == -1 else n for n in shape]
  return jax.make_mesh(
    tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
  )


def mesh_or_default(config: Config) -> Mesh:
  """The run's mesh if it fits these devices and the batch sizes, or one device.

  So a run that was trained on many devices can be evaluated on one.
  """
  try:
    mesh = make_mesh(config.mesh)
    check_batches(config, mesh)
    return mesh
  except ConfigError:
    return one_device()


def one_device() -> Mesh:
  """A mesh of the first device."""
  return make_mesh(MeshConfig(), jax.devices()[:1])


def check_batches(config: Config, mesh: Mesh) -> None:
  """`ConfigError` unless batches divide over the mesh's batch axes."""
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  micro = config.data.batch_size // config.train.accumulate
  for name, size in (
    ("data.batch_size / train.accumulate", micro),
    ("eval.batch_size", config.eval.batch_size),
  ):
    if size % ways:
      raise ConfigError(
        f"{name} = {size} does not divide over mesh.data x mesh.fsdp = {ways}"
      )


def check_kernels(config: Config, mesh: Mesh) -> None:
  """`ConfigError` unless the mesh's devices run `memory.implementation`."""
  name = config.model.memory.implementation
  platform = mesh.devices.flat[0].platform
  if name in ("pallas_tpu", "pallas_gpu") and name != f"pallas_{platform}":
    raise ConfigError(
      f"memory.implementation={name} does not run on a {platform}: take auto"
      " or xla"
    )


@contextlib.contextmanager
def activate(mesh: Mesh):
  """Inside, tracing sees the mesh and the logical rules."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """[B, ...] arrays: rows over the batch axes."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def fast_sharding(x: jax.ShapeDtypeStruct, mesh: Mesh) -> NamedSharding:
  """Fast state [layers, B, ...]: rows over the batch axes."""
  axes = (None, BATCH_AXES) if len(x.shape) > 1 else ()
  return NamedSharding(mesh, PartitionSpec(*axes))


def param_shardings(boxed: Tree, params: Tree, mesh: Mesh) -> Any:
  """Shardings of abstract `params`; `boxed` carries their logical axes.

  A mesh axis that does not divide a dimension (a vocabulary of 129, say) is
  dropped there: that dimension is replicated.
  """
  wanted = spmd.logical_to_mesh_sharding(
    nn.get_partition_spec(boxed), mesh, RULES
  )

  def fit(array: jax.ShapeDtypeStruct, sharding: NamedSharding):
    axes = [
      axis if size % mesh.shape.get(axis, 1) == 0 else None
      for size, axis in zip(array.shape, sharding.spec, strict=False)
    ]
    return NamedSharding(mesh, PartitionSpec(*axes))

  return jax.tree.map(fit, params, wanted)


def process_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
  """(first, last + 1) of a global batch's rows that this process holds."""
  held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  slices = [i[0].indices(batch_size) for i in held.values() if i is not None]
  return min(s[0] for s in slices), max(s[1] for s in slices)


def put_batch(
  batch: dict[str, np.ndarray],
  mesh: Mesh,
  batch_size: int,
  rows: tuple[int, int],
) -> dict[str, jax.Array]:
  """This process's rows -> global arrays [B, ...] over the mesh."""
  sharding = batch_sharding(mesh)

  def put(local: np.ndarray) -> jax.Array:
    def shard(index: Any) -> np.ndarray:
      start, stop, _ = index[0].indices(batch_size)
      return local[start - rows[0] : stop - rows[0]]

    shape = (batch_size, *local.shape[1:])
    return jax.make_array_from_callback(shape, sharding, shard)

  return {key: put(value) for key, value in batch.items()}
