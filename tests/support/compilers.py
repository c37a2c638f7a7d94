"""The compilers of TPUs and GPUs, which run without a chip.

`HOPE_COMPILERS` names the folder where scripts/test.sh installed them; without
it they are looked for beside jax.
"""

import contextlib
import importlib.util
import os
import pathlib
import sys

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from hope_jax.analysis import topology

_H200 = pathlib.Path(__file__).with_name("h200.txtpb")


def _find(module: str) -> None:
  folder = os.environ.get("HOPE_COMPILERS", "")
  if folder and folder not in sys.path:
    sys.path.append(folder)
  if importlib.util.find_spec(module) is None:
    pytest.skip(f"{module} is not installed")


def tpu(name: str) -> list[jax.Device]:
  """The devices of a topology, e.g. "v5e:2x2"; skips without libtpu."""
  _find("libtpu")
  return topology.tpu_devices(name)


def h200() -> jax.Device:
  """One H200; skips without the plugin."""
  _find("jax_cuda13_plugin")
  found = topologies.get_topology_desc(
    platform="cuda",
    topology_name="h200",
    topology="1x1x1",
    target_config=_H200.read_text(),
  )
  return found.devices[0]


def compile_for(device: jax.Device, function, *args):
  """`function` compiled for one device, at arguments' shapes and dtypes."""
  sharding = SingleDeviceSharding(device)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
  )
  is_gpu = device.platform != "tpu"
  platform = dict(lowering_platforms=("cuda",)) if is_gpu else {}
  with _abstract(device) if is_gpu else contextlib.nullcontext():
    lowered = jax.jit(function).trace(*shapes).lower(**platform)
  with _without_cache():
    return lowered.compile()


def _abstract(device: jax.Device):
  """Tells a lowering which GPU it is for."""
  kind = jax.sharding.AbstractDevice(
    device_kind=device.device_kind, num_cores=132, platform="gpu"
  )
  return jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((), (), abstract_device=kind)
  )


@contextlib.contextmanager
def _without_cache():
  """Such programs cannot be serialized."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
