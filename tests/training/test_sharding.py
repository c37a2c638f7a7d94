import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from hope_jax.config import (
  CMSConfig,
  Config,
  ConfigError,
  DataConfig,
  EvalConfig,
  MemoryConfig,
  MeshConfig,
  ModelConfig,
  TrainConfig,
)
from hope_jax.training import sharding
from tests.support.tiers import slow_case

ONE = jax.devices()[:1]


def test_make_mesh_fills_the_open_axis():
  mesh = sharding.make_mesh(MeshConfig(), ONE)
  assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
  "config",
  [
    MeshConfig(data=2),
    MeshConfig(data=-1, fsdp=2),
    MeshConfig(data=-1, fsdp=-1),
    MeshConfig(data=0),
  ],
)
def test_make_mesh_rejects_what_does_not_fit(config):
  with pytest.raises(ConfigError, match="mesh="):
    sharding.make_mesh(config, ONE)


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_kernels_of_other_platforms_are_refused(name):
  mesh = sharding.make_mesh(MeshConfig(), ONE)

  def config(name):
    memory = MemoryConfig(implementation=name)
    return Config(model=ModelConfig(sequence_layer="comba", memory=memory))

  for runs in ("auto", "xla", "pallas_interpret"):
    sharding.check_kernels(config(runs), mesh)
  with pytest.raises(ConfigError, match=f"{name} does not run on a cpu"):
    sharding.check_kernels(config(name), mesh)


def test_put_batch_places_the_rows_of_this_process():
  mesh = sharding.make_mesh(MeshConfig(), ONE)
  rows = sharding.process_rows(mesh, 4)
  local = np.arange(12).reshape(4, 3)
  placed = sharding.put_batch({"tokens": local}, mesh, 4, rows)["tokens"]
  assert rows == (0, 4) and placed.sharding.mesh == mesh
  np.testing.assert_array_equal(placed, local)


EIGHT = """
import dataclasses, json, pathlib, sys
import jax
from hope_jax import config as config_lib
from hope_jax.config import MeshConfig
from hope_jax.data import pipeline
from hope_jax.runs import checkpoints
from hope_jax.training import evaluation, sharding, step

jax.config.update("jax_numpy_rank_promotion", "raise")
config = config_lib.from_config_dict(json.loads(sys.argv[1]))
carrying = config_lib.from_config_dict(json.loads(sys.argv[2]))
folder = pathlib.Path(sys.argv[3])
report = {"devices": jax.device_count()}

def run(name, mesh_config, devices, restore=False, config=config, **train):
  cfg = dataclasses.replace(
    config, train=dataclasses.replace(config.train, **train))
  source, size = pipeline.load(cfg), cfg.data.batch_size
  here = folder / cfg.model.sequence_layer
  mesh = sharding.make_mesh(mesh_config, devices)
  sharding.check_batches(cfg, mesh)
  rows = sharding.process_rows(mesh, size)
  batches = pipeline.TrainBatches(source["train"], size, rows, 6)
  compiled = step.build(cfg, mesh)
  manager = checkpoints.open_manager(here, cfg.train)
  with sharding.activate(mesh):
    state = (checkpoints.restore(manager, compiled.abstract_state)
      if restore else compiled.init(jax.random.key(0)))
    losses = []
    for number in range(int(state.step), int(state.step) + 3):
      batch = sharding.put_batch(batches[number], mesh, size, rows)
      state, metrics = compiled.train_step(state, batch)
      losses.append((float(metrics.loss), float(metrics.grad_norm)))
    test = {"loss": None}
    if not restore and not cfg.train.carry_state:
      test = evaluation.evaluate(compiled.eval_step, state.params,
        source["test"], config=cfg, mesh=mesh)
  if not restore and mesh.size == 8:
    checkpoints.save(manager, 3, state)
  manager.close()
  report[name] = {
    "losses": losses,
    "test": test["loss"],
    "compiled": compiled.train_step._cache_size(),
    "spread": {
      jax.tree_util.keystr(path, simple=True, separator="/"):
        (len({str(s.index) for s in x.addressable_shards}), x.ndim)
      for path, x in jax.tree_util.tree_leaves_with_path(state)},
  }

cube = MeshConfig(data=2, fsdp=2, tensor=2)
run("one", MeshConfig(), jax.devices()[:1])
run("eight", cube, jax.devices())
run("eight_parts", cube, jax.devices(), accumulate=2)
run("resumed", MeshConfig(data=1, fsdp=4), jax.devices()[:4], restore=True)
run("resumed_one", MeshConfig(), jax.devices()[:1], restore=True)
run("carried", cube, jax.devices(), config=carrying)
others = jax.devices()[:4]
run("carried_on", MeshConfig(fsdp=2), others, restore=True, config=carrying)
run("carried_one", MeshConfig(), others[:1], restore=True, config=carrying)
print(json.dumps(report))
"""


def report(folder):
  """Reports of the same run on meshes of 1 and 8 fake devices."""
  config = Config(
    # MQAR's vocabulary of 65 is one that no mesh axis divides.
    model=ModelConfig(
      vocab_size=65, width=16, num_layers=2, num_heads=2, ffn_hidden=32
    ),
    data=DataConfig(kind="mqar", sequence_length=32, batch_size=8),
    eval=EvalConfig(batches=2, batch_size=8),
  )
  memory = MemoryConfig(chunk_length=8, adaptive=())
  carrying = dataclasses.replace(
    config,
    model=dataclasses.replace(
      config.model,
      sequence_layer="titans",
      vocab_size=256,
      num_layers=1,
      memory=memory,
    ),
    data=DataConfig(sequence_length=32, batch_size=8),
    train=TrainConfig(carry_state=True),
  )
  configs = [json.dumps(dataclasses.asdict(c)) for c in (config, carrying)]
  done = child(EIGHT, [*configs, str(folder)])
  return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


def child(program, arguments):
  """Runs a program on 8 fake devices."""
  flags = "--xla_force_host_platform_device_count=8"
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program), *arguments],
    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=900,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done


def check_eight_equal_one(eight):
  assert eight["devices"] == 8
  one = eight["one"]
  for parts in (eight["eight"], eight["eight_parts"]):
    np.testing.assert_allclose(one["losses"], parts["losses"], rtol=1e-5)
    np.testing.assert_allclose(one["test"], parts["test"], rtol=1e-4)


def check_eight_split_parameters_and_moments(eight):
  spread = eight["eight"]["spread"]
  kernels = {
    name: parts
    for name, (parts, _) in spread.items()
    if name.endswith(("mixer/query/kernel", "down/kernel"))
  }
  assert len(kernels) == 2 * 3  # parameter and two moments of each
  assert set(kernels.values()) == {4}  # fsdp x tensor
  embeddings = [v[0] for k, v in spread.items() if k.endswith("embedding")]
  assert embeddings == [2, 2, 2]  # 65 rows do not divide: fsdp alone


def check_eight_do_not_recompile(eight):
  runs = [run for run in eight.values() if isinstance(run, dict)]
  assert {run["compiled"] for run in runs} == {1} and len(runs) == 8


def check_eight_never_gather_an_activation_whole(eight):
  assert "Involuntary full rematerialization" not in eight["stderr"]


def check_checkpoint_restores_onto_other_meshes(eight):
  np.testing.assert_allclose(
    eight["resumed"]["losses"], eight["resumed_one"]["losses"], rtol=1e-5
  )
  assert (
    eight["resumed"]["losses"][0] != eight["one"]["losses"][0]
  )  # it did go on


def check_carried_state_restores_onto_other_meshes(eight):
  """The memories go on where the documents do, on 4 devices as on 1."""
  np.testing.assert_allclose(
    eight["carried_on"]["losses"], eight["carried_one"]["losses"], rtol=1e-5
  )
  fast = [
    parts
    for name, (parts, ndim) in eight["carried"]["spread"].items()
    if "fast/" in name and ndim > 1
  ]
  assert fast and set(fast) == {4}  # rows over data x fsdp


def test_eight_devices(tmp_path, subtests):
  eight = report(tmp_path)
  for check in (
    check_eight_equal_one,
    check_eight_split_parameters_and_moments,
    check_eight_do_not_recompile,
    check_eight_never_gather_an_activation_whole,
    check_checkpoint_restores_onto_other_meshes,
    check_carried_state_restores_onto_other_meshes,
  ):
    with subtests.test(check.__name__):
      check(eight)


LOOPS = """
import json, re, sys
import jax, jax.numpy as jnp
from hope_jax import config as config_lib
from hope_jax.training import sharding, step

config = config_lib.from_config_dict(json.loads(sys.argv[1]))
mesh = sharding.make_mesh(config.mesh)
compiled = step.build(config, mesh)
shape = config.data.batch_size, config.data.sequence_length
rows = sharding.batch_sharding(mesh)
batch = {
  name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
  for name, dtype in (
    ("tokens", jnp.int32), ("targets", jnp.int32), ("weights", jnp.float32))}
with sharding.activate(mesh):
  step = compiled.train_step.lower(compiled.abstract_state, batch).compile()
lines = step.as_text().splitlines()
loop = r"(mixer|recurrence/shard_map|next_token[)]*|cms/level[^:]*)/while/body"
inside = [line for line in lines if re.search(loop, line)]
collective = re.compile(" (all-|reduce-scatter|collective-)[a-z-]*[(]")
found = [line for line in inside if collective.search(line)]
print(json.dumps([len(inside), found]))
"""


def check_loops(config):
  """No collective among the operations inside the loops over chunks."""
  found = child(LOOPS, [json.dumps(dataclasses.asdict(config))])
  inside, collectives = json.loads(found.stdout.splitlines()[-1])
  assert inside > 100 and not collectives


@pytest.mark.parametrize("connection", ["sequential", slow_case("nested")])
def test_devices_do_not_talk_inside_the_chunk_loops(connection):
  """Gradients of M_0 and W_0 are summed over the devices once a sequence."""
  config = Config(
    model=ModelConfig(
      sequence_layer="hope",
      vocab_size=64,
      width=16,
      num_layers=2,
      num_heads=2,
      memory=MemoryConfig(chunk_length=8, projection_chunk_length=16),
      cms=CMSConfig(
        hidden=(8, 8, 16), chunk_lengths=(8, 16, 0), connection=connection
      ),
    ),
    data=DataConfig(sequence_length=64, batch_size=8),
    mesh=MeshConfig(data=4, fsdp=2),
  )
  check_loops(config)


@pytest.mark.parametrize("tensor", [2, slow_case(1)])
def test_devices_do_not_talk_inside_the_next_token_loop(tensor):
  """Rows are split over heads' devices, too; two layers learn."""
  config = Config(
    model=ModelConfig(
      sequence_layer="titans",
      vocab_size=64,
      width=16,
      num_layers=3,
      num_heads=2,
      memory=MemoryConfig(chunk_length=8, adaptive=()),
      cms=CMSConfig(
        hidden=(8, 8, 16),
        chunk_lengths=(8, 16, 0),
        signal="next_token",
        learning_share=0.67,
      ),
    ),
    data=DataConfig(sequence_length=64, batch_size=8),
    mesh=MeshConfig(data=2, fsdp=4 // tensor, tensor=tensor),
  )
  check_loops(config)


def test_devices_do_not_talk_inside_mambas_loop():
  """Those of its keys and decays, on channels split over two devices, too."""
  config = Config(
    model=ModelConfig(
      sequence_layer="mamba",
      vocab_size=64,
      width=16,
      num_layers=1,
      ffn_hidden=0,
      memory=MemoryConfig(chunk_length=8),
    ),
    data=DataConfig(sequence_length=32, batch_size=4),
    mesh=MeshConfig(data=2, fsdp=2, tensor=2),
  )
  check_loops(config)
