"""Opens trained models: the newest checkpoint of a run."""

import hashlib
from typing import NamedTuple

import jax
from etils import epath
from flax.typing import ArrayPytree as Tree
from jax.sharding import Mesh

from hope_jax.config import Config, ConfigError, MeshConfig
from hope_jax.data import pipeline
from hope_jax.data.tokenizer import Tokenizer
from hope_jax.runs import digest, progress
from hope_jax.runs import workdir as workdir_lib
from hope_jax.training import sharding
from hope_jax.training import step as step_lib


class Run(NamedTuple):
  """A trained model that reads texts; `checksum` is of its parameters."""

  workdir: epath.Path
  config: Config
  tokenizer: Tokenizer
  mesh: Mesh
  step: int
  params: Tree
  checksum: str


def open_run(workdir: epath.Path, devices: int = 1) -> Run:
  """The newest checkpoint of a run, on the given number of devices."""
  config = workdir_lib.read_config(workdir)
  tokenizer = load_tokenizer(workdir, config)
  split = MeshConfig(data=1, tensor=devices)
  mesh = sharding.make_mesh(split, jax.devices()[:devices])
  sharding.check_kernels(config, mesh)
  with sharding.activate(mesh):
    step, params = read_params(workdir, config, mesh)
    return Run(workdir, config, tokenizer, mesh, step, params, checksum(params))


def load_tokenizer(workdir: epath.Path, config: Config) -> Tokenizer:
  """The run's tokenizer; `ConfigError` if it has changed or there is none."""
  tokenizer = pipeline.load_tokenizer(config)
  if tokenizer is None:
    raise ConfigError(f"{workdir} was trained on {config.data.kind}, not text")
  workdir_lib.check_data(workdir, config, {"tokenizer": tokenizer.sha256})
  return tokenizer


def read_params(
  workdir: epath.Path, config: Config, mesh: Mesh
) -> tuple[int, Tree]:
  """(step, parameters) of a run's newest checkpoint; prints the number of
  parameters before the slow work begins."""
  abstract = step_lib.abstract_params(config, mesh)
  progress.say(f"{step_lib.count_parameters(abstract):,} parameters")
  from hope_jax.runs import checkpoints  # takes half a second

  return checkpoints.restore_params(workdir, abstract)


def read_on_one_device(workdir: epath.Path, config: Config) -> tuple[int, Tree]:
  """`read_params` of the run on the first device alone."""
  mesh = sharding.one_device()
  with sharding.activate(mesh):
    return read_params(workdir, config, mesh)


def checksum(params: Tree) -> str:
  """A hash that tells checkpoints apart, whatever mesh they are on."""
  found = [leaf.digest for leaf in digest.leaves(params).values()]
  return hashlib.sha256("".join(found).encode()).hexdigest()
