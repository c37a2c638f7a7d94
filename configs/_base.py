"""What all configs share: `make` and `parse`.

A config sets what it changes; all defaults, with their meaning, stand in the
dataclasses of `hope_jax/config`.  A command line can override every field of
these, `--config.model.memory.error_clip=0.5`: it needs the groups only.
"""

from typing import TYPE_CHECKING

from hope_jax.config import nearest

if TYPE_CHECKING:
  import ml_collections

GROUPS = {
  "model": {"memory": {}, "cms": {}, "rope_scaling": {}},
  "opt": {},
  "data": {"text": {}, "records": {}, "mqar": {}},
  "mesh": {},
  "train": {},
  "eval": {},
}


def make(**groups: dict) -> "ml_collections.ConfigDict":
  """The given fields by group; others keep their defaults."""
  import ml_collections  # which scripts/gpu_check has to do without

  config = ml_collections.ConfigDict(GROUPS)
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
