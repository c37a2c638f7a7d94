import itertools

import numpy as np
import pytest

from hope_jax.config import Config, DataConfig, ModelConfig
from hope_jax.data import pipeline

CONFIGS = {
  "text": Config(data=DataConfig(sequence_length=32)),
  "mqar": Config(
    model=ModelConfig(vocab_size=65),
    data=DataConfig(kind="mqar", sequence_length=32),
  ),
}


def assert_same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("kind", CONFIGS)
def test_batch_has_the_promised_arrays(kind):
  source = pipeline.load(CONFIGS[kind])["train"]
  batch = pipeline.TrainBatches(source, 4, (0, 4), 10)[7]
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    "tokens": ((4, 32), "int32"),
    "targets": ((4, 32), "int32"),
    "weights": ((4, 32), "float32"),
  }


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("workers", [0, 2])
def test_batch_depends_on_the_step_alone(kind, workers):
  source = pipeline.load(CONFIGS[kind])["train"]
  batches = pipeline.TrainBatches(source, 4, (0, 4), 2000)
  for step, batch in itertools.islice(
    enumerate(pipeline.prefetch(batches, 1500, workers), 1500), 30
  ):
    fresh = pipeline.load(CONFIGS[kind])["train"]
    assert_same(batch, pipeline.TrainBatches(fresh, 4, (0, 4), 2000)[step])


def test_steps_take_the_source_in_order():
  source = pipeline.load(CONFIGS["mqar"])["train"]
  batch = pipeline.TrainBatches(source, 4, (0, 4), 10)[7]
  np.testing.assert_array_equal(
    batch["tokens"], [source[i]["tokens"] for i in range(28, 32)]
  )


def test_prefetch_ends_with_the_run():
  source = pipeline.load(CONFIGS["mqar"])["train"]
  batches = pipeline.TrainBatches(source, 2, (0, 2), 5)
  assert len(list(pipeline.prefetch(batches, 2))) == 3
  assert not list(pipeline.prefetch(batches, 5))


def test_processes_share_the_global_batch():
  source = pipeline.load(CONFIGS["text"])["train"]
  whole = pipeline.TrainBatches(source, 8, (0, 8), 10)[3]
  parts = [
    pipeline.TrainBatches(source, 8, rows, 10)[3] for rows in ((0, 4), (4, 8))
  ]
  assert_same(
    whole,
    {k: np.concatenate([part[k] for part in parts]) for k in whole},
  )


def test_eval_batches_read_the_split_once_and_pad():
  source = pipeline.load(CONFIGS["text"])["valid"]
  batches = list(pipeline.eval_batches(source, 8, (0, 8)))
  targets = np.concatenate(
    [batch["targets"][batch["weights"] > 0] for batch in batches]
  )
  np.testing.assert_array_equal(
    targets,
    np.concatenate(
      [
        source[i]["targets"][source[i]["weights"] > 0]
        for i in range(len(source))
      ]
    ),
  )
  assert {batch["tokens"].shape for batch in batches} == {(8, 32)}
  assert len(list(pipeline.eval_batches(source, 8, (0, 8), limit=3))) == 3
