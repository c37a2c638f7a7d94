"""Evaluates a run: loss and accuracy of a split, as one line of JSON.

python -m hope_jax.evaluate --workdir=runs/x --split=test
python -m hope_jax.evaluate --workdir=runs/x --writes=off --level=memory,cms_0

`--writes=off` switches the memories' writes off: of all of them, or of the
levels named by `--level`.  `--path` reads other data than training's, of the
same kind and tokenizer.  `--length=4096` reads longer sequences than training
did (text).  `--positions` adds the scores of the first 64 positions, the next
64, the next 128 ...: does more context help?  `--dynamics` adds what the
memories did in the split's first batch, per layer and level: learn rates,
half-lives, |D| / |M_0| at the end ...  Numbers that are not finite are null; if
the loss is one of them, the exit code is 1 and `--output` is not written.
"""

import dataclasses
import json
import math
from typing import Any

from absl import flags
from etils import epath

from hope_jax import files
from hope_jax.config import Config, ConfigError
from hope_jax.data import pipeline
from hope_jax.model_config import ModelConfig
from hope_jax.training import (
  checkpoints,
  command,
  evaluation,
  faults,
  progress,
  sharding,
)
from hope_jax.training import step as step_lib
from hope_jax.training import workdir as workdir_lib


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "folder of the run", required=True)
  flags.DEFINE_enum("split", "test", ["valid", "test"], "evaluated split")
  flags.DEFINE_enum("writes", "on", ["on", "off"], "inner learning")
  flags.DEFINE_list("level", [], "with --writes=off: these levels only")
  flags.DEFINE_string("path", None, "data, if not training's")
  flags.DEFINE_integer("length", None, "tokens per sequence, if not training's")
  flags.DEFINE_bool("positions", False, "also scores by position")
  flags.DEFINE_bool("dynamics", False, "also what the memories do inside")
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


def elsewhere(config: Config, path: str) -> Config:
  """`config` on the data in `path`."""
  if config.data.kind == "mqar":
    raise ConfigError("--path is for data that is read, not for mqar")
  data = dataclasses.replace(config.data, path=path, weights=())
  return dataclasses.replace(config, data=data)


def lengthen(config: Config, length: int) -> Config:
  """`config` on sequences of `length` tokens, as many tokens in all."""
  if config.data.kind != "text":
    raise ConfigError(f"--length is for text, not {config.data.kind}")
  data = dataclasses.replace(config.data, sequence_length=length)
  old = config.eval.batch_size * config.data.sequence_length
  batch_size = max(1, old // length)
  batches = config.eval.batches
  if batches:
    batches = max(1, batches * old // (batch_size * length))
  changed = dataclasses.replace(
    config.eval, batch_size=batch_size, batches=batches
  )
  return dataclasses.replace(config, data=data, eval=changed)


def evaluate(
  config: Config,
  workdir: epath.Path,
  split: str,
  *,
  with_dynamics: bool = False,
  with_positions: bool = False,
) -> dict:
  """Scores the newest checkpoint of `workdir` as the model of `config`."""
  if with_dynamics and not config.model.fast_levels:
    raise ConfigError(
      f"--dynamics: {config.model.sequence_layer} has no level that writes"
    )
  mesh = sharding.mesh_or_default(config)
  source = pipeline.load(config)[split]
  tokenizer = pipeline.load_tokenizer(config)
  if tokenizer is not None:
    data = {"tokenizer": tokenizer.sha256}
    workdir_lib.check_data(workdir, config, data)
  with sharding.activate(mesh):
    compiled = step_lib.build(config, mesh)
    count, size = len(source), config.eval.batch_size
    count = min(count, config.eval.batches * size or count)
    length = config.data.sequence_length
    progress.say(
      f"evaluating {count} x {length} = {count * length:,} tokens of the"
      f" {split} split of {config.data.path or config.data.kind}"
    )
    step, params = checkpoints.restore_params(
      workdir, compiled.abstract_state.params
    )
    scores: dict[str, Any] = evaluation.evaluate(
      compiled.eval_step,
      params,
      source,
      config=config,
      mesh=mesh,
      with_positions=with_positions,
    )
    if with_dynamics:
      scores |= evaluation.inner_dynamics(
        params, source, config=config, mesh=mesh
      )
  derived = evaluation.derived(scores["loss"], config)
  return {"step": step, "split": split, **scores, **derived}


def main() -> None:
  args = flags.FLAGS
  output = files.check_output(args.output, "output") if args.output else None
  workdir = files.reach(args.workdir)
  levels = tuple(args.level)
  config = workdir_lib.read_config(workdir)
  if args.writes == "off":
    model = switch_off(config.model, levels)
    config = dataclasses.replace(config, model=model)
  elif levels:
    raise ConfigError("--level needs --writes=off")
  if args.path is not None:
    config = elsewhere(config, args.path)
  if args.length is not None:
    config = lengthen(config, args.length)
  scores = {
    "workdir": str(workdir),
    "model": config.model.sequence_layer,
    "writes": args.writes,
    "levels": list(levels),
    "path": config.data.path,
    "length": config.data.sequence_length,
    **evaluate(
      config,
      workdir,
      args.split,
      with_dynamics=args.dynamics,
      with_positions=args.positions,
    ),
  }
  print(json.dumps(workdir_lib.finite(scores)))
  if not math.isfinite(scores["loss"]):
    raise faults.Diverged(
      f"the {args.split} loss of {workdir} is not finite (null above)"
    )
  if output is None:
    return
  try:
    workdir_lib.write_json(output, workdir_lib.finite(scores))
  except OSError as error:
    raise checkpoints.SaveFailed(
      f"cannot write {output}: {files.reason(error)}"
    ) from error


if __name__ == "__main__":
  define_flags()
  command.run(main)
