"""The model as a nested system: its components by update frequency.

python -m hope_jax.levels --config=configs/shakespeare.py:hope \\
    --config.model.memory.chunk_length=32 --json=levels.json --figure=levels.png

`analysis/levels.py` says what is counted, and how.
"""

from absl import flags

from hope_jax import cli
from hope_jax.config import ConfigError
from hope_jax.runs import files, progress
from hope_jax.runs import workdir as workdir_lib


def define_flags() -> None:
  cli.define_config()
  flags.DEFINE_string("json", None, "also write the table there, as JSON")
  flags.DEFINE_string("figure", None, "also draw the spectrum there, a .png")


def main() -> None:
  args = flags.FLAGS
  if args.figure and not args.figure.endswith(".png"):
    raise ConfigError(f"--figure={args.figure} must end with .png")
  if args.json:
    files.check_output(args.json, "json")
  if args.figure:
    files.check_output(args.figure, "figure")
  config = cli.read_config()
  progress.say(f"counting {cli.describe(config.model)}, nothing is executed")
  from hope_jax.analysis import levels

  found = levels.components(config)
  content = levels.report(config, found)
  print(levels.markdown(content) + levels.LEGEND)
  try:
    if args.json:
      workdir_lib.write_json(files.reach(args.json), content)
    if args.figure:
      levels.draw(config, found, files.reach(args.figure))
  except OSError as error:
    message = f"cannot write {error.filename}: {files.reason(error)}"
    raise ConfigError(message) from error


if __name__ == "__main__":
  define_flags()
  cli.run(main)
