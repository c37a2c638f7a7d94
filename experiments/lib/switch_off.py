"""The two controls of every claim about a memory (the twin gate).

On small text the convolutions, gates and learned initial states do most of a
memory model's work, so its loss alone proves nothing.  A claim needs the
*twin* (the same model, trained separately with all inner rates off) and the
*switch-off* (the live-trained model with its writes off at evaluation).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.lib.trials import Evaluation, Trial
from hope_jax.config.layers import LAYERS

TWIN = {"model.inner_rates": "off"}

# The models of all comparisons: row -> mode of the config.
MODELS = {traits.title: name for name, traits in LAYERS.items()}
MODELS = {
  "Transformer++": MODELS["Transformer++"],
  "Transformer++ conv": "transformer_conv",
  **MODELS,
}

# Mode -> groups of levels to switch off, besides all of them at once.
_LEVELS = {
  "hope": (
    ("memory",),
    ("k", "v", "eta", "alpha"),
    ("cms_0",),
    ("cms_1",),
  ),
  "hope_attention": (("cms_0",), ("cms_1",)),
}


def _learns(mode: str) -> bool:
  """Whether a mode learns inside the sequence, so that it has a twin."""
  return mode in _LEVELS or (mode in LAYERS and LAYERS[mode].learns)


def with_twins(rows: Iterable[str]) -> tuple[str, ...]:
  """The models `rows`, each followed by its twin if it has one."""
  found = []
  for row in rows:
    found.append(row)
    if _learns(MODELS[row]):
      found.append(f"{row} twin")
  return tuple(found)


# All rows -> (mode of the config, overrides).
ROWS = {
  row: (MODELS[row.removesuffix(" twin")], TWIN if row not in MODELS else {})
  for row in with_twins(MODELS)
}
# Rows that two cores can repeat on many seeds.
CORE_ROWS = with_twins(
  ("Transformer++", "Transformer++ conv", "Titans", "Hope")
)

LONG = 4096  # tokens


def trial(
  row: str,
  *,
  group: str,
  name: str,
  config: str,
  suffix: str,
  overrides: Mapping[str, Any],
  evaluations: tuple[Evaluation, ...] | None = None,
) -> Trial:
  """A row of a comparison as a trial; live memories with all switch-offs.

  `suffix` is added to the row's mode; `evaluations` replaces the switch-offs.
  """
  mode, own = ROWS[row]
  if evaluations is None:
    evaluations = switch_offs(row)
  return Trial(
    group=group,
    row=row,
    name=name,
    config=config,
    mode=mode + suffix,
    overrides={**own, **overrides},
    evaluations=evaluations,
  )


def long_evaluation(row: str) -> Evaluation:
  """Test loss on longer sequences, and how far live memories move there."""
  flags = ("--split=test", f"--length={LONG}")
  if switch_offs(row):
    flags = (*flags, "--dynamics")
  return Evaluation(f"length_{LONG}", flags)


def switch_offs(row: str) -> tuple[Evaluation, ...]:
  """Test loss with all writes off, and with those of each level off; nothing
  for a row that writes nothing."""
  mode, overrides = ROWS[row]
  if not _learns(mode) or overrides == TWIN:
    return ()
  off = ("--split=test", "--writes=off")
  levels = [",".join(names) for names in _LEVELS.get(mode, ())]
  return (
    Evaluation("off", off),
    *(Evaluation(f"off_{l}", (*off, f"--level={l}")) for l in levels),
  )


def describe(label: str) -> str:
  """`off_cms_0` -> `writes off: cms_0`."""
  if label.startswith("length_"):
    return f"T {int(label.removeprefix('length_')):,}"
  level = label.removeprefix("off").removeprefix("_")
  return f"writes off: {level or 'all'}"
