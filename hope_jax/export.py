"""Writes a run's parameters as safetensors (`interchange/safetensors.py`).

python -m hope_jax.export --workdir=runs/x --output=models/x
python -m hope_jax.train --config=... --workdir=runs/y \
  --config.train.init_from=models/x
"""

from absl import flags
from etils import epath

from hope_jax import cli
from hope_jax.runs import errors, files, progress
from hope_jax.runs import workdir as workdir_lib


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "folder of the run", required=True)
  flags.DEFINE_string("output", None, "folder of the export", required=True)


def export_run(workdir: epath.Path, folder: epath.Path) -> int:
  """Writes the newest checkpoint of a run to `folder`; returns its step."""
  from hope_jax.inference import trained
  from hope_jax.interchange import formats

  config = workdir_lib.read_config(workdir)
  step, params = trained.read_on_one_device(workdir, config)
  formats.export(folder, config, params)
  return step


def main() -> None:
  import safetensors

  args = flags.FLAGS
  folder = files.check_folder(args.output, "output")
  workdir = files.reach(args.workdir)
  model = workdir_lib.read_config(workdir).model
  progress.say(
    f"exporting {cli.describe(model)}, workdir {workdir}, to {folder}"
  )
  cli.announce_devices(1)
  try:
    step = export_run(workdir, folder)
  except (OSError, safetensors.SafetensorError) as error:
    raise errors.SaveFailed(
      f"cannot write to {folder}: {files.reason(error)}"
    ) from error
  print(f"{args.workdir}, step {step} -> {args.output}")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
