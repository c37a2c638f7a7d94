"""1.3B parameters on 100B tokens of FineWeb-Edu: the paper's recipe.

Paper: Table 2 (1.3B / 100B).
Command: python -m hope_jax.train --config=configs/hope_1p3b.py:hope \
  --config.data.path=FOLDER --workdir=runs/hope-1p3b
Modes: the models of `_models.py`; with `smoke` four steps of the tiny model on
  the embedded text.
Data: FOLDER holds train.txt, valid.txt and test.txt.  Text is read as bytes
  so far; the vocabulary of 32,000 subwords is the recipe's.
Hardware: an accelerator pod; the mesh by --config.mesh.fsdp, .tensor.
Expected: Hope 14.39 Wiki ppl / 58.04 avg, Transformer++ 17.92 / 53.38, Titans
  15.60 / 56.82.
Measured: not trained yet; parameter counts are tested.
"""

from configs import _paper


def get_config(arg=None):
  """`arg` is a comma-separated list of modes; the default is `hope`."""
  return _paper.recipe(arg, "1p3b", tokens=100e9)
