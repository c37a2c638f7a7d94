"""340M parameters on 15B tokens of FineWeb-Edu: the paper's recipe.

Paper: Table 2 (340M / 15B, NeurIPS version).
Command: python -m hope_jax.train --config=configs/hope_340m.py:hope \
  --config.data.path=FOLDER --workdir=runs/hope-340m
Modes: the models of `_models.py`; with `smoke` four steps of the tiny model on
  the embedded text.
Data: FOLDER holds train.txt, valid.txt and test.txt.  Text is read as bytes
  so far; the vocabulary of 32,000 subwords is the recipe's.
Hardware: an accelerator pod; the mesh by --config.mesh.fsdp, .tensor.
Expected: Hope 26.05 Wiki ppl / 46.90 avg, Transformer++ 31.52 / 42.92, Titans
  (LMM) 26.18 / 46.17 (NeurIPS version, Titans paper).
Measured: not trained yet; parameter counts are tested.
"""

from configs import _paper


def get_config(arg=None):
  """`arg` is a comma-separated list of modes; the default is `hope`."""
  return _paper.recipe(arg, "340m", tokens=15e9)
