"""The two controls of every claim about a memory (the twin gate).

On small text the convolutions, gates and learned initial states do most of a
memory model's work, so its loss alone proves nothing.  A claim needs the
*twin* (the same model, trained separately with all inner rates off) and the
*switch-off* (the live-trained model with its writes off at evaluation).
"""

from experiments.trials import Evaluation

TWIN = {"model.inner_rates": "off"}

_LEVELS = {
  "titans": (),  # its memory is all it has
  "hope": (
    ("memory",),
    ("k", "v", "eta", "alpha"),
    ("cms_0",),
    ("cms_1",),
  ),
}


LONG = 4096


def long_evaluation(*, is_live: bool) -> Evaluation:
  """Test loss on longer sequences, and how far live memories move there."""
  flags = ("--split=test", f"--length={LONG}")
  if is_live:
    flags = (*flags, "--dynamics")
  return Evaluation(f"length_{LONG}", flags)


def evaluations(model: str) -> tuple[Evaluation, ...]:
  """Test loss with all writes off, and with those of each level off."""
  if model not in _LEVELS:
    return ()
  off = ("--split=test", "--writes=off")
  levels = [",".join(names) for names in _LEVELS[model]]
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
