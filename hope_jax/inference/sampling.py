"""How texts are continued, and checks of that which need no model."""

from collections.abc import Sequence
from typing import NamedTuple

from hope_jax.config import ConfigError


class Sampling(NamedTuple):
  """How a token is drawn: from softmax(logits / temperature), restricted to the
  `top_k` likeliest tokens (0: all) and to the likeliest that sum to `top_p`."""

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def check(self) -> None:
    """`ConfigError` for invalid values."""
    if not self.temperature >= 0:
      raise ConfigError(f"--temperature={self.temperature} must be 0 or more")
    if self.top_k < 0:
      raise ConfigError(f"--top_k={self.top_k} must be 0 (all) or more")
    if not 0 < self.top_p <= 1:
      raise ConfigError(f"--top_p={self.top_p} must be above 0, at most 1")


def check_request(count: int, sampling: Sampling, stop: Sequence[str]) -> None:
  """`ConfigError` if the sampling flags ask for the impossible."""
  if count < 1:
    raise ConfigError(f"--tokens={count} must be positive")
  if "" in stop:
    raise ConfigError("--stop is empty: give at least one character")
  sampling.check()


def check_prompts(prompts: Sequence[str]) -> None:
  """`ConfigError` unless there are prompts, none of them empty."""
  if not prompts:
    raise ConfigError("no prompt: give --prompt or --prompt_file")
  for number, prompt in enumerate(prompts, 1):
    if not prompt:
      which = f"prompt {number}" if len(prompts) > 1 else "--prompt"
      raise ConfigError(f"{which} is empty: give at least one character")
