"""Helpers of all configs: `make` and `parse`.

A config sets only the fields that it changes; the dataclasses of
`hope_jax/config` hold all defaults and document every field.  The command line
can override any of these, whether the config sets it or not, for `make`
creates all groups: `--config.model.memory.error_clip=0.5`.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from hope_jax.config import Config, nearest

if TYPE_CHECKING:
  import ml_collections


def _empty_groups(config: Any) -> dict[str, Any]:
  """The groups of a dataclass, nested and all empty."""
  values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
  return {
    name: _empty_groups(value)
    for name, value in values.items()
    if dataclasses.is_dataclass(value)
  }


def make(**groups: dict) -> "ml_collections.ConfigDict":
  """A config with the given fields, by group; others keep their defaults."""
  import ml_collections  # scripts/gpu_check runs without it

  config = ml_collections.ConfigDict(_empty_groups(Config()))
  config.update(groups)
  return config


def parse(
  arg: str | None, default: str, names: tuple[str, ...], *switches: str
) -> tuple[str, set[str]]:
  """Splits a mode, `"hope,smoke"`, into a model's name and its switches."""
  words = arg.split(",") if arg else []
  for word in words:
    if word not in (*names, *switches):
      known = (*names, *switches)
      raise ValueError(
        f"unknown mode {word!r}{nearest(word, known)} (all: {', '.join(known)})"
      )
  chosen = [word for word in words if word in names] or [default]
  if len(chosen) > 1:
    raise ValueError(f"mode {arg!r} names more than one model")
  return chosen[0], set(words) - {chosen[0]}
