"""What a training step takes on a TPU, by the TPU's compiler; needs no TPU.

JAX_PLATFORMS=cpu python -m scripts.compile_step \
  --config=configs/hope_340m.py:hope --topology=v5e:4x4 \
  --config.data.batch_size=16 --config.mesh.fsdp=16

Compiles the step for the topology's chips with the memories in XLA and in the
kernels, side by side: bytes per chip (reported by the compiler), FLOPs per
token with and without recomputation (counted in the jaxpr), kernel calls.
Needs the extra `aot` (libtpu).
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.lib import tables
from hope_jax import cli
from hope_jax.analysis import flops, topology
from hope_jax.config import Config, ConfigError
from hope_jax.training import sharding
from hope_jax.training import step as step_lib

GIB = 2**30


def compile_step(config: Config, devices: list[Any]) -> dict[str, str]:
  """A line of the table."""
  mesh = sharding.make_mesh(config.mesh, devices)
  sharding.check_batches(config, mesh)
  compiled = step_lib.build(config, mesh)
  data = config.data
  shape = data.batch_size, data.sequence_length
  batch = {
    name: jax.ShapeDtypeStruct(
      shape, dtype, sharding=sharding.batch_sharding(mesh)
    )
    for name, dtype in (
      ("tokens", jnp.int32),
      ("targets", jnp.int32),
      ("weights", jnp.float32),
    )
  }
  line = {"memories": config.model.memory.implementation}
  begin = time.monotonic()
  with sharding.activate(mesh):
    state = compiled.abstract_state
    total = flops.count(compiled.train_step, state, batch)
    lowered = compiled.train_step.lower(state, batch)
    try:
      program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return line | {"does not fit": str(error).splitlines()[0][:200]}
  memory = program.memory_analysis()
  model = flops.per_token(config, state.params)
  return line | {
    "arguments GiB": f"{memory.argument_size_in_bytes / GIB:.2f}",
    "temporary GiB": f"{memory.temp_size_in_bytes / GIB:.2f}",
    "MFLOP/token": f"{model / 1e6:,.0f}",
    "with recomputation": f"{total / batch['tokens'].size / 1e6:,.0f}",
    "kernel calls": str(program.as_text().count('"tpu_custom_call"')),
    "compiled in s": f"{time.monotonic() - begin:.0f}",
  }


def main() -> None:
  args = flags.FLAGS
  jax.config.update("jax_enable_compilation_cache", False)
  config = cli.read_config()
  if config.model.has_attention:
    raise ConfigError(f"{config.model.sequence_layer} has no memories")
  devices = topology.tpu_devices(args.topology)
  lines = []
  for implementation in args.implementations:
    memory = dataclasses.replace(
      config.model.memory, implementation=implementation
    )
    model = dataclasses.replace(config.model, memory=memory)
    config = dataclasses.replace(config, model=model)
    lines.append(compile_step(config, devices))
  print(tables.markdown(lines))
  print(
    f"{config.model.sequence_layer}, {args.topology}: {len(devices)}"
    f" {devices[0].device_kind}, {config.data.batch_size} x"
    f" {config.data.sequence_length} tokens; bytes are of one chip"
  )


if __name__ == "__main__":
  cli.define_config()
  flags.DEFINE_string("topology", "v5e:4x4", "of the slice to compile for")
  flags.DEFINE_list(
    "implementations", ["xla", "pallas_tpu"], "of memory.implementation"
  )
  cli.run(main)
