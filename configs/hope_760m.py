"""760M parameters on 30B tokens of FineWeb-Edu: the paper's recipe.

Paper: Table 2 (760M / 30B).
Command: python -m hope_jax.train --config=configs/hope_760m.py:hope \
  --config.data.path=FOLDER --workdir=runs/hope-760m
Modes: the models of `_models.py`; with `smoke` four steps of the tiny model on
  the embedded text.
Data: FOLDER holds train.txt, valid.txt and test.txt.  Text is read as bytes
  so far; the vocabulary of 32,000 subwords is the recipe's.
Hardware: an accelerator pod; the mesh by --config.mesh.fsdp, .tensor.
Expected: Hope 18.68 Wiki ppl / 52.28 avg, Transformer++ 24.18 / 50.11, Titans
  20.08 / 51.68.
Measured: not trained yet; parameter counts are tested.
"""

from configs import _paper


def get_config(arg=None):
  """`arg` is a comma-separated list of modes; the default is `hope`."""
  return _paper.recipe(arg, "760m", tokens=30e9)
