"""Writes a run's parameters as safetensors (`training/exchange.py`).

python -m hope_jax.export --workdir=runs/x --output=models/x
python -m hope_jax.train --config=... --workdir=runs/y \
  --config.train.init_from=models/x
"""

import jax
from absl import flags
from etils import epath

from hope_jax import files
from hope_jax.config import MeshConfig
from hope_jax.data import pipeline, tokenizer
from hope_jax.training import checkpoints, command, exchange, sharding
from hope_jax.training import step as step_lib
from hope_jax.training import workdir as workdir_lib


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "folder of the run", required=True)
  flags.DEFINE_string("output", None, "folder of the export", required=True)


def export(workdir: epath.Path, folder: epath.Path) -> int:
  """Exports the newest checkpoint of a run; returns its step."""
  config = workdir_lib.read_config(workdir)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  with sharding.activate(mesh):
    compiled = step_lib.build(config, mesh)
    step, params = checkpoints.restore_params(
      workdir, compiled.abstract_state.params
    )
  exchange.save(folder, config, params)
  words = pipeline.load_tokenizer(config)
  data = {"tokenizer": words.sha256} if words else {}
  workdir_lib.write_json(folder / workdir_lib.DATA, data)
  if words:
    tokenizer.save(words, folder)
  return step


def main() -> None:
  import safetensors

  args = flags.FLAGS
  folder = files.check_folder(args.output, "output")
  try:
    step = export(files.reach(args.workdir), folder)
  except (OSError, safetensors.SafetensorError) as error:
    raise checkpoints.SaveFailed(
      f"cannot write to {folder}: {files.reason(error)}"
    ) from error
  print(f"{args.workdir}, step {step} -> {args.output}")


if __name__ == "__main__":
  define_flags()
  command.run(main)
