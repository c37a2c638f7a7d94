"""1.3B parameters on 100B tokens of FineWeb-Edu: the paper's recipe.

Paper: Table 2 (1.3B / 100B).
Data: the parquet files of HuggingFaceFW/fineweb-edu, sample/100BT, under
  data/.  Documents of at least 4,096 tokens make a quarter of the examples: the
  paper mixes in long documents but does not say how many.
Prepare, once for the three sizes:
  python -m scripts.prepare_data --output=data/fineweb_edu \
    --tokenizer=sentencepiece:32000 --length=4096 --align=256 --long=4096 \
    --holdout=0.0001,0.0001 --licence=ODC-By \
    data/fineweb-edu/sample/100BT/*.parquet
Command:
  python -m hope_jax.train --config=configs/hope_1p3b.py:hope \
    --workdir=runs/hope-1p3b
Modes: the models of `_models.py`; with `smoke` four steps of the tiny model at
  T 256 on 4 MB of one of the files, in 512 subwords:
  python -m scripts.prepare_data --output=data/fineweb_edu_smoke \
    --tokenizer=sentencepiece:512 --length=256 --align=256 --long=256 \
    --holdout=0.1,0.1 --part_bytes=4000000 --parts=1 \
    data/fineweb-edu/sample/100BT/000_00000.parquet
  python -m hope_jax.train --config=configs/hope_1p3b.py:hope,smoke \
    --workdir=runs/hope-1p3b-smoke
Hardware: an accelerator pod; --config.mesh.fsdp and .tensor set the mesh.
Expected: Hope 14.39 Wiki ppl / 58.04 avg, Transformer++ 17.92 / 53.38, Titans
  15.60 / 56.82.
Measured: not trained yet; tests check the parameter counts and that the
  commands of `smoke` run.
"""

from configs import _paper


def get_config(arg=None):
  """`arg` is a comma-separated list of modes; the default is `hope`."""
  return _paper.recipe(arg, "1p3b", tokens=100e9)
