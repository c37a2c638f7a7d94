"""Writes a run's parameters as safetensors (`training/exchange.py`).

python -m hope_jax.export --workdir=runs/x --output=models/x
python -m hope_jax.train --config=... --workdir=runs/y \
  --config.train.init_from=models/x
"""

from absl import flags

from hope_jax import files
from hope_jax.training import command, faults, progress
from hope_jax.training import workdir as workdir_lib


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "folder of the run", required=True)
  flags.DEFINE_string("output", None, "folder of the export", required=True)


def main() -> None:
  import safetensors

  args = flags.FLAGS
  folder = files.check_folder(args.output, "output")
  workdir = files.reach(args.workdir)
  model = workdir_lib.read_config(workdir).model
  progress.say(
    f"exporting {command.describe(model)}, workdir {workdir}, to {folder}"
  )
  command.announce_devices(1)
  from hope_jax.interchange import runs

  try:
    step = runs.export(workdir, folder)
  except (OSError, safetensors.SafetensorError) as error:
    raise faults.SaveFailed(
      f"cannot write to {folder}: {files.reason(error)}"
    ) from error
  print(f"{args.workdir}, step {step} -> {args.output}")


if __name__ == "__main__":
  define_flags()
  command.run(main)
