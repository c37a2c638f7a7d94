"""Evaluates a run: loss and accuracy of a split, as one line of JSON.

python -m hope_jax.evaluate --workdir=runs/x --split=test
python -m hope_jax.evaluate --workdir=runs/x --writes=off --level=memory,cms_0

`--writes=off` switches the memories' writes off: of all of them, or of the
levels named by `--level`.
"""

import dataclasses
import json
import pathlib
from typing import Any

from absl import flags

from hope_jax.config import Config, ConfigError, ModelConfig
from hope_jax.data import pipeline
from hope_jax.training import (
  checkpoints,
  command,
  evaluation,
  sharding,
)
from hope_jax.training import step as step_lib
from hope_jax.training import workdir as workdir_lib


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "folder of the run", required=True)
  flags.DEFINE_enum("split", "test", ["valid", "test"], "evaluated split")
  flags.DEFINE_enum("writes", "on", ["on", "off"], "inner learning")
  flags.DEFINE_list("level", [], "with --writes=off: these levels only")
  flags.DEFINE_string("output", None, "also write the JSON there")


def switch_off(model: ModelConfig, levels: tuple[str, ...]) -> ModelConfig:
  """`model` without the writes of `levels`, or of all of them if empty."""
  if not model.fast_levels:
    raise ConfigError(
      f"--writes=off: {model.sequence_layer} has no level that writes"
    )
  if levels:
    frozen = model.frozen_levels + levels
    return dataclasses.replace(model, frozen_levels=frozen)
  return dataclasses.replace(model, inner_rates="off")


def evaluate(config: Config, workdir: pathlib.Path, split: str) -> dict:
  """Scores the newest checkpoint of `workdir` as the model of `config`."""
  mesh = sharding.mesh_or_default(config)
  sources = pipeline.load(config)
  with sharding.activate(mesh):
    compiled = step_lib.build(config, mesh)
    step, params = checkpoints.restore_params(
      workdir, compiled.abstract_state.params
    )
    scores: dict[str, Any] = evaluation.evaluate(
      compiled.eval_step, params, sources[split], config=config, mesh=mesh
    )
  derived = evaluation.derived(scores["loss"], config.data.kind)
  return {"step": step, "split": split, **scores, **derived}


def main() -> None:
  args = flags.FLAGS
  workdir = pathlib.Path(args.workdir)
  levels = tuple(args.level)
  config = workdir_lib.read_config(workdir)
  if args.writes == "off":
    model = switch_off(config.model, levels)
    config = dataclasses.replace(config, model=model)
  elif levels:
    raise ConfigError("--level needs --writes=off")
  scores = {
    "workdir": str(workdir),
    "model": config.model.sequence_layer,
    "writes": args.writes,
    "levels": list(levels),
    **evaluate(config, workdir, args.split),
  }
  print(json.dumps(scores))
  if args.output:
    workdir_lib.write_json(pathlib.Path(args.output), scores)


if __name__ == "__main__":
  define_flags()
  command.run(main)
