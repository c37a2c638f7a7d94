"""The chips of a TPU slice, to compile for them on a machine without one.

The compiler is in the package `libtpu` (extra `aot`).
"""

import importlib.util
import os
from typing import Any

from jax.experimental import topologies

from hope_jax.config import ConfigError

# What libtpu would otherwise query from a cloud machine, and its lock.
_WITHOUT_TPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5p-8",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_devices(name: str) -> list[Any]:
  """The devices of a topology: "v5e:4x4", "v5:2x2x1" (v5p), "v6e:2x2".

  Raises:
    ConfigError: libtpu is not installed, or knows no such topology.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError("compiling for a TPU needs libtpu: pip install .[aot]")
  for key, value in _WITHOUT_TPU.items():
    os.environ.setdefault(key, value)
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=name)
  except Exception as error:  # whatever the compiler's library raises
    reason = str(error).splitlines()[0]
    raise ConfigError(f"no TPU topology {name!r}: {reason}") from error
  return list(found.devices)
