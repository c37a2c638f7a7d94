"""Evaluates a run: loss and accuracy of a split, as one line of JSON.

python -m hope_jax.evaluate --workdir=runs/x --split=test
python -m hope_jax.evaluate --workdir=runs/x --writes=off --level=memory,cms_0

`--writes=off` switches off the writes of all fast levels, or of those named by
`--level`.  `--path` evaluates on other data, of the same kind and tokenizer.
`--length=4096` reads longer sequences than training did (text only).
`--positions` adds the scores of the first 64 positions, the next 64, the next
128 ..., which show whether more context helps.  `--dynamics` adds what the
memories did in the split's first batch, per layer and level: learn rates,
half-lives, |D| / |M_0| at the end ...  Numbers that are not finite are null; if
the loss is one of them, the exit code is 1 and `--output` is not written.
"""

import dataclasses
import json
import math

from absl import flags

from hope_jax import cli
from hope_jax.config import ConfigError
from hope_jax.inference import variants
from hope_jax.runs import errors, files, progress
from hope_jax.runs import workdir as workdir_lib


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


def main() -> None:
  args = flags.FLAGS
  output = files.check_output(args.output, "output") if args.output else None
  workdir = files.reach(args.workdir)
  levels = tuple(args.level)
  config = workdir_lib.read_config(workdir)
  if args.writes == "off":
    model = variants.switch_off(config.model, levels)
    config = dataclasses.replace(config, model=model)
  elif levels:
    raise ConfigError("--level needs --writes=off")
  if args.path is not None:
    config = variants.elsewhere(config, args.path)
  if args.length is not None:
    config = variants.lengthen(config, args.length)
  if args.dynamics:
    variants.check_dynamics(config.model)
  progress.say(
    f"evaluating {cli.describe(config.model)}, {args.split} split,"
    f" workdir {workdir}"
  )
  from hope_jax.training import sharding  # jax takes 1.5 s

  cli.announce_devices(sharding.mesh_or_default(config).size)
  from hope_jax.inference import evaluation

  scores = {
    "workdir": str(workdir),
    "model": config.model.sequence_layer,
    "writes": args.writes,
    "levels": list(levels),
    "path": config.data.path,
    "length": config.data.sequence_length,
    **evaluation.evaluate(
      config,
      workdir,
      args.split,
      with_dynamics=args.dynamics,
      with_positions=args.positions,
    ),
  }
  print(json.dumps(workdir_lib.finite(scores)))
  if not math.isfinite(scores["loss"]):
    raise errors.Diverged(
      f"the {args.split} loss of {workdir} is not finite (null above)"
    )
  if output is not None:
    cli.write_output(output, scores)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
