"""Checkpoints of Hugging Face `transformers` -> runs, and back.

python -m hope_jax.convert --from_hf=FOLDER --workdir=runs/llama
python -m hope_jax.convert --workdir=runs/x --to_hf=FOLDER

The first makes the folder of a run, for `hope_jax.evaluate` (on the text of
`--text`), `generate`, `session` and `export`; training can start from such an
export (`train.init_from`).  The folder has no optimizer state, so training
cannot resume there.  The second writes config.json, model.safetensors (float32)
and the tokenizer's files, for `transformers`.  The models that can be converted
are listed in `interchange/hugging_face.py`.  Neither command needs
`transformers` or torch; a tokenizer.json needs the extra `convert`.

A model's float32 parameters have to fit into the memory of this machine.
"""

import sys
from typing import Any

from absl import flags
from etils import epath

from hope_jax import cli
from hope_jax.config import ConfigError, DataConfig
from hope_jax.runs import files, progress
from hope_jax.runs import workdir as workdir_lib


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "folder of the run", required=True)
  flags.DEFINE_string("from_hf", None, "folder of a checkpoint to read")
  flags.DEFINE_string("to_hf", None, "folder of a checkpoint to write")
  flags.DEFINE_string(
    "text", None, f"what evaluations read; default: {DataConfig.path}"
  )
  flags.DEFINE_integer(
    "context_length", None, "of attention's cache; default: the checkpoint's"
  )


def main() -> None:
  args = flags.FLAGS
  if bool(args.from_hf) == bool(args.to_hf):
    raise ConfigError("give either --from_hf or --to_hf")
  if args.to_hf:
    if args.text or args.context_length is not None:
      raise ConfigError("--text and --context_length are for --from_hf")
    _to_hf(args)
  else:
    _from_hf(args)


def to_hf(workdir: epath.Path, folder: epath.Path) -> int:
  """Writes a run's newest checkpoint for `transformers`; returns its step."""
  from hope_jax.inference import trained
  from hope_jax.interchange import formats, hugging_face

  config = workdir_lib.read_config(workdir)
  hugging_face.write_config(config.model)  # raises before anything is read
  step, params = trained.read_on_one_device(workdir, config)
  formats.to_hf(folder, config, params)
  return step


def _to_hf(args: Any) -> None:
  folder = files.check_folder(args.to_hf, "to_hf")
  files.check_empty(folder)
  workdir = files.reach(args.workdir)
  model = workdir_lib.read_config(workdir).model
  progress.say(
    f"converting {cli.describe(model)}, workdir {workdir}, to {folder}"
  )
  cli.announce_devices(1)
  step = to_hf(workdir, folder)
  print(f"{workdir}, step {step} -> {args.to_hf}")


def _from_hf(args: Any) -> None:
  folder, workdir = files.reach(args.from_hf), files.reach(args.workdir)
  files.check_empty(workdir)
  progress.say(f"converting {folder} to a run, workdir {workdir}")
  cli.announce_devices(1)
  from hope_jax.data import tokenizer
  from hope_jax.interchange import formats

  config = formats.from_hf(
    folder, workdir, text=args.text, context_length=args.context_length
  )
  print(f"{args.from_hf} -> {workdir}: {cli.describe(config.model)}")
  if config.data.text.tokenizer == tokenizer.BYTES:
    print(f"{args.from_hf} has no tokenizer: texts are bytes", file=sys.stderr)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
