"""Continues a text with a trained model.

python -m hope_jax.generate --workdir=runs/x --prompt="ROMEO:" --tokens=200

The prompt is read at once, then one token at a time is drawn; both go
through the model's explicit fast state, which keeps learning.

Legend: T prompt tokens, N new tokens, V vocab.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from hope_jax.config import ConfigError, MeshConfig, ModelConfig
from hope_jax.data import tokenizer
from hope_jax.models import language_model
from hope_jax.training import (
  checkpoints,
  command,
  sharding,
)
from hope_jax.training import step as step_lib
from hope_jax.training import workdir as workdir_lib


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "folder of the run", required=True)
  flags.DEFINE_string("prompt", None, "text to continue", required=True)
  flags.DEFINE_integer("tokens", 200, "how many tokens to add")
  flags.DEFINE_float("temperature", 1.0, "0: always the likeliest token")
  flags.DEFINE_integer("top_k", 0, "draw from the k likeliest; 0: from all")
  flags.DEFINE_float("top_p", 1.0, "draw from the likeliest with sum top_p")
  flags.DEFINE_integer("seed", 0, "of the draws")


class Sampling(NamedTuple):
  """How a token is drawn; see the flags of the same names."""

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def check(self) -> None:
    """`ConfigError` for values without meaning."""
    if not self.temperature >= 0:
      raise ConfigError(f"--temperature={self.temperature} must be 0 or more")
    if self.top_k < 0:
      raise ConfigError(f"--top_k={self.top_k} must be 0 (all) or more")
    if not 0 < self.top_p <= 1:
      raise ConfigError(f"--top_p={self.top_p} must be above 0, at most 1")


def draw(key: jax.Array, logits_V: jax.Array, sampling: Sampling) -> jax.Array:
  """One token from softmax(logits / temperature), cut to top k and top p.

  The token that crosses probability top_p is kept, so one always remains.
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits_V)
  logits_V = logits_V / sampling.temperature
  sorted_V = jnp.sort(logits_V, descending=True)
  least = jnp.asarray(-jnp.inf)
  if sampling.top_k:
    least = sorted_V[min(sampling.top_k, logits_V.size) - 1]
  if sampling.top_p < 1:
    kept_V = jnp.where(sorted_V >= least, sorted_V, -jnp.inf)
    probability_V = jax.nn.softmax(kept_V)
    before_V = jnp.cumsum(probability_V) - probability_V
    least = jnp.min(jnp.where(before_V < sampling.top_p, kept_V, jnp.inf))
  return jax.random.categorical(
    key, jnp.where(logits_V >= least, logits_V, -jnp.inf)
  )


@functools.partial(jax.jit, static_argnames=("config", "count", "sampling"))
def continue_tokens(
  params: Any,
  prompt_T: jax.Array,
  key: jax.Array,
  *,
  config: ModelConfig,
  count: int,
  sampling: Sampling,
) -> jax.Array:
  """`count` new tokens [N] after `prompt_T`: prefill, then decode."""
  model = language_model.LanguageModel(config)

  def next_token(key: jax.Array, logits_BTV: jax.Array) -> jax.Array:
    return draw(key, logits_BTV[0, -1, : tokenizer.VOCAB_SIZE], sampling)

  def decode(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
    state, token = carry
    output = step_lib.forward(model, params, token[None, None], state=state)
    following = next_token(key, output.logits)
    return (output.state, following), token

  keys = jax.random.split(key, count + 1)
  state = language_model.init_state(config, 1)
  output = step_lib.forward(model, params, prompt_T[None], state=state)
  first = next_token(keys[0], output.logits)
  _, tokens_N = jax.lax.scan(decode, (output.state, first), keys[1:])
  return tokens_N


def generate(
  workdir: pathlib.Path,
  prompt: str,
  *,
  count: int,
  sampling: Sampling,
  seed: int = 0,
) -> str:
  """The continuation of `prompt` by the newest checkpoint of `workdir`."""
  if not prompt:
    raise ConfigError("--prompt is empty: give at least one character")
  if count < 1:
    raise ConfigError(f"--tokens={count} must be positive")
  sampling.check()
  config = workdir_lib.read_config(workdir)
  if config.data.kind != "text":
    raise ConfigError(f"{workdir} was trained on {config.data.kind}, not text")
  tokens = tokenizer.encode(prompt)
  model, total = config.model, len(tokens) + count
  is_bounded = model.sequence_layer in ("transformer", "hope_attention")
  if is_bounded and total > model.context_length:
    raise ConfigError(
      f"prompt and continuation have {total} tokens, but attention's cache"
      f" holds model.context_length={model.context_length}"
    )
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  with sharding.activate(mesh):
    compiled = step_lib.build(config, mesh)
    _, params = checkpoints.restore_params(
      workdir, compiled.abstract_state.params
    )
    new = continue_tokens(
      params,
      jnp.asarray(tokens),
      jax.random.key(seed),
      config=model,
      count=count,
      sampling=sampling,
    )
  return tokenizer.decode(np.asarray(new))


def main() -> None:
  args = flags.FLAGS
  text = generate(
    pathlib.Path(args.workdir),
    args.prompt,
    count=args.tokens,
    sampling=Sampling(args.temperature, args.top_k, args.top_p),
    seed=args.seed,
  )
  print(args.prompt + text)


if __name__ == "__main__":
  define_flags()
  command.run(main)
