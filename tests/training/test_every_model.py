"""What holds for every model of `configs/_models.py`: devices and resuming."""

import json
import math

import numpy as np
import pytest

from configs import _base, _models
from hope_jax import config as config_lib
from hope_jax.config.layers import LAYERS
from tests.support.tiers import slow_case
from tests.training.test_sharding import child

EVERY = """
import json, pathlib, sys
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from hope_jax import config as config_lib
from hope_jax.config import MeshConfig
from hope_jax.data import pipeline
from hope_jax.runs import checkpoints
from hope_jax.training import sharding, step
from tests.support.jit import fast_compile

jax.config.update("jax_numpy_rank_promotion", "raise")
KEY = jax.random.key(0)
# Copies that share the writing of an array compile a slice for every shape:
# test_sharding.py has enough of that.
ocp.type_handlers.register_type_handler(jax.Array,
  ocp.type_handlers.ArrayHandler(use_replica_parallel=False), override=True)

def start(abstract, is_logit):
  \"""A state of noise: initialising would be one more compilation.\"""
  rng = np.random.default_rng(0)
  def put(scale):
    return lambda x: jax.device_put(
      (scale * rng.normal(size=x.shape)).astype(x.dtype), x.sharding)
  state = jax.tree.map(put(0.0), abstract)
  # Memora's initial states are logits: small ones are almost equal weights.
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: put(1.0 if is_logit and "initial" in str(path) else 0.1)(x),
    abstract.params)
  return state.replace(
    params=params,
    fast=jax.tree.map(put(0.1), abstract.fast))

def types(state):
  return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)

def prepare(config, mesh):
  source = pipeline.load(config)["train"]
  batches = pipeline.TrainBatches(source, 8, (0, 8), 2)
  batches = [
    sharding.put_batch(batches[n], mesh, 8, (0, 8)) for n in range(2)]
  compiled = step.build(config, mesh)
  with sharding.activate(mesh):
    train_step = fast_compile(
      compiled.train_step, compiled.abstract_state, batches[0])
  return compiled, train_step, batches

def moments(state):
  return [x for _, x in optax.tree.get_all_with_path(state.opt_state, "mu")]

def scalars(metrics):
  return float(metrics.loss), float(metrics.grad_norm)

def run(config, folder):
  one = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  compiled, train_step, batches = prepare(config, one)
  is_logit = config.model.sequence_layer == "memora"
  fresh = start(compiled.abstract_state, is_logit)
  state, before = train_step(fresh, batches[0])
  gradient = jax.device_get(moments(state))
  expected = [scalars(before), scalars(train_step(state, batches[1])[1])]

  cube = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  compiled, train_step, (first, second) = prepare(config, cube)
  abstract = compiled.abstract_state
  state, before = train_step(start(abstract, is_logit), first)
  error = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max() / (np.abs(a).max() or 1)),
    gradient, jax.device_get(moments(state)))
  weights = jax.tree.leaves(state.params)
  held = sum(x.addressable_shards[0].data.size for x in weights)
  manager = checkpoints.open_manager(folder, config.train)
  checkpoints.save(manager, 1, state)
  state, after = train_step(state, second)
  again = checkpoints.restore(manager, abstract)
  resumed = train_step(again, second)
  manager.close()
  pairs = zip(*map(jax.tree.leaves, ((state, after), resumed)), strict=True)
  return {
    "one": expected,
    "eight": [scalars(before), scalars(after)],
    "gradient_error": {
      jax.tree_util.keystr(path, simple=True, separator="/"): x
      for path, x in jax.tree_util.tree_leaves_with_path(error)},
    "resumes": all(np.array_equal(a, b) for a, b in pairs),
    "types": types(state) == types(abstract)
      == types(jax.eval_shape(compiled.init, KEY)),
    "held": held / sum(x.size for x in weights),
  }

report = {}
for name, fields in json.loads(sys.argv[1]).items():
  config = config_lib.from_config_dict(fields)
  report[name] = run(config, pathlib.Path(sys.argv[2]) / name)
print(json.dumps(report))
"""


def tiny(name):
  """The smallest model of this name, as the configs make it."""
  group = _models.model(
    name,
    "tiny",
    memory_chunks=(8, 16),
    cms_chunks=(8, 16, 0),
    vocab_size=256,
    width=16,
    num_layers=2 if name == "samba" else 1,
  )
  group["memory"]["chunk_length"] = 8
  if group["memory"]["hidden"]:
    group["memory"]["hidden"] = 16
  if group["ffn_hidden"]:
    group["ffn_hidden"] = 32
  if "cms" in group:
    group["cms"]["hidden"] = (8, 8, 16)
  if "attention_window" in group:
    group["attention_window"] = 8
  fields = _base.make(
    model=group,
    data={"sequence_length": 32, "batch_size": 8},
    eval={"batch_size": 8},
    # Adam divides by the gradient's size: of rounding errors it makes steps.
    opt={"peak_lr": 1e-2, "warmup_steps": 1, "eps": 1e-2},
  )
  config = config_lib.from_config_dict(fields)
  carries = not config.model.has_longest_context
  fields.update({"train": {"carry_state": carries}})
  return config_lib.to_dict(config_lib.from_config_dict(fields))


# Those that are another model of the list with other options.
VARIANTS = (
  "transformer",
  "titans_mal",
  "dla",
  "ttt_linear",
  "retnet",
  "deltanet",
  "comba",
)
REST = tuple(name for name in _models.NAMES if name not in VARIANTS)


def test_models_are_all_sequence_layers():
  layers = {tiny(name)["model"]["sequence_layer"] for name in _models.NAMES}
  assert layers == {*LAYERS}


@pytest.mark.parametrize("names", [REST, slow_case(VARIANTS)])
def test_devices_and_resuming(names, tmp_path, subtests):
  """Two steps on 8 devices are those on one, and the second of them from a
  checkpoint is the same bit for bit, carried state included."""
  configs = {name: tiny(name) for name in names}
  arguments = [json.dumps(configs), str(tmp_path)]
  done = child(EVERY, arguments)
  assert "Involuntary full rematerialization" not in done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  assert [*found] == [*names]
  for name, run in found.items():
    with subtests.test(name):
      losses = [loss for loss, _ in run["one"]]
      assert all(map(math.isfinite, losses)) and losses[0] != losses[1]
      np.testing.assert_allclose(run["eight"], run["one"], rtol=1e-5)
      # Norms do not show what is wrong in a small parameter's gradient.
      worst = max(run["gradient_error"].items(), key=lambda item: item[1])
      assert worst[1] < 1e-3, worst
      assert run["resumes"]
      assert run["types"]  # or the second step compiles again
      assert run["held"] < 0.5  # of the parameters, by each device
