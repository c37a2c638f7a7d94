"""Continuing token sequences: prefill in a few reads, then one token at a time.

Everything that a model remembers is in an explicit state of constant size (an
attention cache excepted).  Prompts of any length are read one at a time
(`inference/streaming.py`); then all sequences are decoded together, each at its
own position.

Legend: N sequences, T prompt tokens, V vocab, L state leaves with batch 1.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import ArrayPytree as Tree

from hope_jax.config import ConfigError, ModelConfig
from hope_jax.inference import streaming
from hope_jax.inference.sampling import Sampling
from hope_jax.models import language_model, next_token_levels

READ_SIZE = streaming.READ_SIZE  # tokens of prefill at a time
DECODE_STEPS = 32  # tokens decoded between two checks of `is_over`


def draw(key: jax.Array, logits_V: jax.Array, sampling: Sampling) -> jax.Array:
  """Draws one token; at temperature 0, takes the likeliest.

  The token with which the sum crosses top_p is kept, so one always remains.
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


def prefill(
  params: Tree, prompt: np.ndarray, *, config: ModelConfig
) -> tuple[jax.Array, Any]:
  """Reads a prompt [T], T > 0, from the beginning: (logits [V] after it, fast
  state with batch 1)."""
  assert len(prompt), "an empty prompt"
  read = streaming.extend(
    params,
    streaming.start(config),
    prompt[None],
    config=config,
    read_size=READ_SIZE,
  )
  return read.logits[0], read.state.fast


@functools.partial(
  jax.jit,
  static_argnames=("config", "count", "sampling", "vocab_size"),
  donate_argnames="states",
)
def decode(
  params: Tree,
  states: Tree,
  logits_NV: jax.Array,
  keys_N: jax.Array,
  *,
  config: ModelConfig,
  count: int,
  sampling: Sampling,
  vocab_size: int,
) -> tuple[jax.Array, jax.Array, Any]:
  """Draws `count` tokens for every sequence, starting from `logits_NV`.

  Returns tokens [N, count], and the logits and states to continue from.
  """

  def one(state: Tree, logits_V: jax.Array, key: jax.Array) -> Any:
    token = draw(key, logits_V[:vocab_size], sampling).astype(jnp.int32)
    output = streaming.forward(params, state, token[None, None], config=config)
    return output.state, output.logits[0, -1], token

  def step(carry: Tree, number: jax.Array) -> tuple[Any, jax.Array]:
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys_N, number)
    states, logits = carry
    if next_token_levels.is_on(config):  # vmap would update every time
      arguments = (states, logits, keys)
      states, logits, tokens_N = jax.lax.map(lambda xs: one(*xs), arguments)
    else:
      states, logits, tokens_N = jax.vmap(one)(states, logits, keys)
    return (states, logits), tokens_N

  (states, logits_NV), tokens = jax.lax.scan(
    step, (states, logits_NV), jnp.arange(count)
  )
  return tokens.T, logits_NV, states


def generate(
  params: Tree,
  prompts: Sequence[np.ndarray],
  *,
  config: ModelConfig,
  count: int,
  **options: Any,
) -> list[np.ndarray]:
  """Up to `count` new tokens for every prompt (of any lengths); `options` are
  those of `go_on`."""
  check_room(prompts, config=config, count=count)
  read = [prefill(params, prompt, config=config) for prompt in prompts]
  logits, states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *read)
  return go_on(params, states, logits, config=config, count=count, **options)


def check_room(
  prompts: Sequence[np.ndarray], *, config: ModelConfig, count: int
) -> None:
  """`ConfigError` if attention cannot hold a prompt and `count` tokens more."""
  longest = max(len(prompt) for prompt in prompts) + count
  if config.has_longest_context and longest > config.context_length:
    raise ConfigError(
      f"prompt and continuation have {longest} tokens, but attention's cache"
      f" holds model.context_length={config.context_length}: shorten them, or"
      " train with a longer one"
    )


def go_on(
  params: Tree,
  states: Tree,
  logits: jax.Array,
  *,
  config: ModelConfig,
  count: int,
  sampling: Sampling,
  vocab_size: int,
  seed: int = 0,
  numbers: Sequence[int] | None = None,
  is_over: Callable[[np.ndarray], bool] = lambda tokens: False,
) -> list[np.ndarray]:
  """Up to `count` new tokens for each of N sequences that have been read.

  `states` (stacked fast states of batch 1, donated) and `logits` [N, V] are
  what `prefill` returns.  `is_over` is evaluated every DECODE_STEPS tokens.
  What a sequence draws depends only on the seed and on its number (`numbers`;
  default: 0, 1 ...).

  Raises:
    ConfigError: logits are not finite.
  """
  check_finite(logits)
  root = jax.random.key(seed)
  found = [np.zeros(0, np.int32) for _ in logits]
  numbers_N = jnp.asarray(range(len(found)) if numbers is None else numbers)
  for first in range(0, count, DECODE_STEPS):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
      jax.random.fold_in(root, first), numbers_N
    )
    tokens, logits, states = decode(
      params,
      states,
      logits,
      keys,
      config=config,
      count=min(DECODE_STEPS, count - first),
      sampling=sampling,
      vocab_size=vocab_size,
    )
    check_finite(logits)
    found = [
      np.concatenate([old, new])
      for old, new in zip(found, np.asarray(tokens), strict=True)
    ]
    if all(is_over(tokens) for tokens in found):
      break
  return found


def check_finite(logits: jax.Array) -> None:
  """`ConfigError` for logits that are not finite."""
  if not jnp.isfinite(logits).all():
    raise ConfigError(
      "the model's logits are not finite: its parameters are damaged or"
      " diverged; take another checkpoint"
    )


def state_bytes(config: ModelConfig) -> int:
  """Bytes of one sequence's state."""
  state = jax.eval_shape(lambda: language_model.init_state(config, 1))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
