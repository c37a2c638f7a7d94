"""Continues texts with a trained model.

python -m hope_jax.generate --workdir=runs/x --prompt="ROMEO:" --tokens=200
python -m hope_jax.generate --workdir=runs/x --prompt_file=prompts.txt

Prompts are read into the model's explicit fast state, which keeps learning
while tokens are drawn.  One prompt: its text and what follows, as it is.
Several (--prompt more than once, or a file with one a line): a line of JSON
each, {"prompt", "text"}.
"""

import json
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from etils import epath

from hope_jax import files, generation
from hope_jax.config import ConfigError, MeshConfig
from hope_jax.data import pipeline
from hope_jax.data import text as text_lib
from hope_jax.data.tokenizer import Tokenizer
from hope_jax.generation import Sampling
from hope_jax.training import checkpoints, command, progress, sharding
from hope_jax.training import step as step_lib
from hope_jax.training import workdir as workdir_lib


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "folder of the run", required=True)
  flags.DEFINE_multi_string("prompt", [], "text to continue")
  flags.DEFINE_string("prompt_file", None, "file with a prompt on each line")
  define_sampling_flags()


def define_sampling_flags() -> None:
  """How a text is continued: the same here and in sessions."""
  flags.DEFINE_integer("tokens", 200, "how many tokens to add at the most")
  flags.DEFINE_float("temperature", 1.0, "0: always the likeliest token")
  flags.DEFINE_integer("top_k", 0, "draw from the k likeliest; 0: from all")
  flags.DEFINE_float("top_p", 1.0, "draw from the likeliest with sum top_p")
  flags.DEFINE_multi_string("stop", [], "end before this text")
  flags.DEFINE_integer("seed", 0, "of the draws")


def cut(
  tokens: np.ndarray, tokenizer: Tokenizer, stop: Sequence[str]
) -> tuple[str, bool]:
  """Text of new tokens up to their end; whether that end was reached."""
  ends = np.flatnonzero(tokens == tokenizer.eos)
  if len(ends):
    tokens = tokens[: ends[0]]
  text = tokenizer.decode(tokens)
  places = [text.find(mark) for mark in stop]
  places = [place for place in places if place >= 0]
  return text[: min(places, default=None)], bool(len(ends) or places)


def check_request(count: int, sampling: Sampling, stop: Sequence[str]) -> None:
  """`ConfigError` where the sampling flags ask for the impossible."""
  if count < 1:
    raise ConfigError(f"--tokens={count} must be positive")
  if "" in stop:
    raise ConfigError("--stop is empty: give at least one character")
  sampling.check()


def generate(
  workdir: epath.Path,
  prompts: Sequence[str],
  *,
  count: int,
  sampling: Sampling,
  stop: Sequence[str] = (),
  seed: int = 0,
) -> list[str]:
  """Continuations of `prompts` by the newest checkpoint of `workdir`."""
  if not prompts:
    raise ConfigError("no prompt: give --prompt or --prompt_file")
  for number, prompt in enumerate(prompts, 1):
    if not prompt:
      which = f"prompt {number}" if len(prompts) > 1 else "--prompt"
      raise ConfigError(f"{which} is empty: give at least one character")
  check_request(count, sampling, stop)
  config = workdir_lib.read_config(workdir)
  tokenizer = pipeline.load_tokenizer(config)
  if tokenizer is None:
    raise ConfigError(f"{workdir} was trained on {config.data.kind}, not text")
  data = {"tokenizer": tokenizer.sha256}
  workdir_lib.check_data(workdir, config, data)
  encoded = [tokenizer.encode(prompt) for prompt in prompts]
  generation.check_room(encoded, config=config.model, count=count)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  with sharding.activate(mesh):
    compiled = step_lib.build(config, mesh)
    _, params = checkpoints.restore_params(
      workdir, compiled.abstract_state.params
    )
    with progress.waiting("compiling and drawing", patience=2.0):
      new = generation.generate(
        params,
        encoded,
        config=config.model,
        count=count,
        sampling=sampling,
        vocab_size=tokenizer.vocab_size,
        seed=seed,
        is_over=lambda tokens: cut(tokens, tokenizer, stop)[1],
      )
  return [cut(tokens, tokenizer, stop)[0] for tokens in new]


def read_prompts(path: str) -> list[str]:
  """The lines of a file; other line breaks than \\n and \\r\\n are text."""
  data = text_lib.read(files.reach(path)).tobytes()
  lines = text_lib.decode(data, path).removesuffix("\n").split("\n")
  return [line.removesuffix("\r") for line in lines]


def main() -> None:
  args = flags.FLAGS
  prompts = list(args.prompt)
  if args.prompt_file:
    prompts += read_prompts(args.prompt_file)
  texts = generate(
    files.reach(args.workdir),
    prompts,
    count=args.tokens,
    sampling=Sampling(args.temperature, args.top_k, args.top_p),
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
  command.run(main)
