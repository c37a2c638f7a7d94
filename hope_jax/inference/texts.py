"""Continuations of texts by a trained model."""

from collections.abc import Sequence

import numpy as np
from etils import epath

from hope_jax.data.tokenizer import Tokenizer
from hope_jax.inference import generation, trained
from hope_jax.inference.sampling import Sampling, check_prompts, check_request
from hope_jax.runs import progress
from hope_jax.runs import workdir as workdir_lib
from hope_jax.training import sharding


def cut(
  tokens: np.ndarray, tokenizer: Tokenizer, stop: Sequence[str]
) -> tuple[str, bool]:
  """Text of new tokens up to a stop or end token; whether they have one."""
  ends = np.flatnonzero(tokens == tokenizer.eos)
  if len(ends):
    tokens = tokens[: ends[0]]
  text = tokenizer.decode(tokens)
  places = [text.find(mark) for mark in stop]
  places = [place for place in places if place >= 0]
  return text[: min(places, default=None)], bool(len(ends) or places)


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
  check_prompts(prompts)
  check_request(count, sampling, stop)
  config = workdir_lib.read_config(workdir)
  sharding.check_kernels(config, sharding.one_device())
  tokenizer = trained.load_tokenizer(workdir, config)
  encoded = [tokenizer.encode(prompt) for prompt in prompts]
  generation.check_room(encoded, config=config.model, count=count)
  _, params = trained.read_on_one_device(workdir, config)
  with (
    sharding.activate(sharding.one_device()),
    progress.waiting("compiling and drawing", patience=2.0),
  ):
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
