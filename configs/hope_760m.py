"""760M parameters on 30B tokens of FineWeb-Edu: the paper's recipe.

Paper: Table 2 (760M / 30B).
Data: the parquet files of HuggingFaceFW/fineweb-edu, sample/100BT, under
  data/.  Documents of at least 4,096 tokens make a quarter of the examples: the
  paper mixes in long documents but does not say how many.
Prepare, once for the three sizes:
  python -m scripts.prepare_data --output=data/fineweb_edu \
    --tokenizer=sentencepiece:32000 --length=4096 --align=256 --long=4096 \
    --holdout=0.0001,0.0001 --licence=ODC-By \
    data/fineweb-edu/sample/100BT/*.parquet
Command:
  python -m hope_jax.train --config=configs/hope_760m.py:hope \
    --workdir=runs/hope-760m
Modes: the models of `_models.py`; with `smoke` four steps of the tiny model at
  T 256 on 4 MB of one of the files, in 512 subwords:
  python -m scripts.prepare_data --output=data/fineweb_edu_smoke \
    --tokenizer=sentencepiece:512 --length=256 --align=256 --long=256 \
    --holdout=0.1,0.1 --part_bytes=4000000 --parts=1 \
    data/fineweb-edu/sample/100BT/000_00000.parquet
  python -m hope_jax.train --config=configs/hope_760m.py:hope,smoke \
    --workdir=runs/hope-760m-smoke
Hardware: an accelerator pod; --config.mesh.fsdp and .tensor set the mesh.
Expected: Hope 18.68 Wiki ppl / 52.28 avg, Transformer++ 24.18 / 50.11, Titans
  20.08 / 51.68.
Measured: not trained yet; tests check the parameter counts and that the
  commands of `smoke` run.
"""

from configs import _paper


def get_config(arg=None):
  """`arg` is a comma-separated list of modes; the default is `hope`."""
  return _paper.recipe(arg, "760m", tokens=30e9)
