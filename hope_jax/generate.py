"""Continues texts with a trained model.

python -m hope_jax.generate --workdir=runs/x --prompt="ROMEO:" --tokens=200
python -m hope_jax.generate --workdir=runs/x --prompt_file=prompts.txt

Prompts are read into the model's explicit fast state, which keeps learning
while tokens are drawn.  With one --prompt, the prompt and its continuation are
printed as text.  With several, or with a file of one prompt per line, each
gives a line of JSON: {"prompt", "text"}.
"""

import json

from absl import flags

from hope_jax import cli
from hope_jax.inference import sampling as sampling_lib
from hope_jax.runs import files, progress
from hope_jax.runs import workdir as workdir_lib


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "folder of the run", required=True)
  flags.DEFINE_multi_string("prompt", [], "text to continue")
  flags.DEFINE_string("prompt_file", None, "file with a prompt on each line")
  cli.define_sampling()


def read_prompts(path: str) -> list[str]:
  """The lines of a file; only \\n and \\r\\n end a line."""
  from hope_jax.data import text as text_lib

  data = text_lib.read(files.reach(path)).tobytes()
  lines = text_lib.decode(data, path).removesuffix("\n").split("\n")
  return [line.removesuffix("\r") for line in lines]


def main() -> None:
  args = flags.FLAGS
  prompts = list(args.prompt)
  if args.prompt_file:
    prompts += read_prompts(args.prompt_file)
  sampling_lib.check_prompts(prompts)
  sampling = cli.read_sampling(args)
  workdir = files.reach(args.workdir)
  model = workdir_lib.read_config(workdir).model
  progress.say(
    f"generating with {cli.describe(model)}, up to {len(prompts):,} x"
    f" {args.tokens:,} tokens, workdir {workdir}"
  )
  cli.announce_devices(1)
  from hope_jax.inference import texts as texts_lib

  texts = texts_lib.generate(
    workdir,
    prompts,
    count=args.tokens,
    sampling=sampling,
    stop=args.stop,
    seed=args.seed,
  )
  if len(prompts) == 1 and not args.prompt_file:
    print(prompts[0] + texts[0])
    return
  for prompt, text in zip(prompts, texts, strict=True):
    print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))


if __name__ == "__main__":
  define_flags()
  cli.run(main)
