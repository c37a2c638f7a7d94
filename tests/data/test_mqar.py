import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hope_jax.config import ConfigError, DataConfig, MQARConfig
from hope_jax.data import mqar

CONFIG = DataConfig(
  kind="mqar",
  sequence_length=40,
  mqar=MQARConfig(num_pairs=8, num_keys=16, num_values=12),
)


def with_pairs(**changes):
  """CONFIG with other fields of its group `mqar`, or of its own."""
  own = {k: changes.pop(k) for k in ("sequence_length", "seed") if k in changes}
  mqar = dataclasses.replace(CONFIG.mqar, **changes)
  return dataclasses.replace(CONFIG, mqar=mqar, **own)


@given(st.integers(0, 10**9), st.integers(0, 5))
def test_recall_example_is_solvable_and_nothing_else_is_asked(index, seed):
  config = dataclasses.replace(CONFIG, seed=seed)
  example = mqar.Recall(config, "train")[index]
  tokens, targets, weights = (
    example[name] for name in ("tokens", "targets", "weights")
  )
  keys, values = tokens[:16:2], tokens[1:16:2]
  assert len(set(keys)) == 8
  assert keys.min() >= 1 and keys.max() <= 16
  assert values.min() >= 17 and values.max() <= 28
  answers = dict(zip(keys, values, strict=True))
  (asked,) = np.nonzero(weights)
  assert set(weights[asked]) == {1.0} and asked.min() >= 16
  assert sorted(tokens[asked]) == sorted(keys)
  np.testing.assert_array_equal(
    targets[asked], [answers[key] for key in tokens[asked]]
  )
  rest = np.delete(tokens, asked)[16:]
  np.testing.assert_array_equal(rest, mqar.FILLER)


def test_recall_rows_of_mixed_sizes():
  config = with_pairs(train_pairs=(2, 4, 8))
  seen = set()
  for index in range(40):
    row = mqar.Recall(config, "train")[index]
    count = row["segments"].max() + 1
    seen.add(8 // count)
    assert row["weights"].sum() == 8
    for part in range(count):
      here = row["segments"] == part
      tokens, asked = row["tokens"][here], row["weights"][here] > 0
      pairs = 8 // count
      assert here.sum() == 40 // count and asked.sum() == pairs
      answers = dict(
        zip(tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True)
      )
      expected = [answers[key] for key in tokens[asked]]
      np.testing.assert_array_equal(row["targets"][here][asked], expected)
  assert seen == {2, 4, 8}
  assert "segments" not in mqar.Recall(config, "test")[0]


def test_recall_trains_on_one_size_after_the_other():
  config = with_pairs(num_pairs=8, train_pairs=(2, 8), stage_examples=3)
  train = mqar.Recall(config, "train")
  sizes = [8 // len(set(train[index]["segments"])) for index in range(9)]
  assert sizes == [2] * 3 + [8] * 6


def test_recall_query_order_is_random():
  recall = mqar.Recall(CONFIG, "train")
  in_order = 0
  for index in range(200):
    example = recall[index]
    asked = example["tokens"][example["weights"] > 0]
    in_order += asked[0] == example["tokens"][0]
  assert 5 < in_order < 60  # 25 expected


def test_recall_splits_and_seeds_differ_and_repeat():
  def tokens(split, seed, index=5):
    config = dataclasses.replace(CONFIG, seed=seed)
    return tuple(mqar.Recall(config, split)[index]["tokens"])

  drawn = {
    tokens(split, seed)
    for split in ("train", "valid", "test")
    for seed in range(3)
  }
  assert len(drawn) == 9
  assert tokens("test", 0) == tokens("test", 0)


@pytest.mark.parametrize(
  ("changes", "vocab", "message"),
  [
    ({"num_pairs": 14}, 64, "data.sequence_length"),
    ({"num_pairs": 17, "sequence_length": 99}, 64, "data.mqar.num_keys"),
    ({"num_pairs": 0}, 64, "positive"),
    ({"train_pairs": (4, 3)}, 64, "data.mqar.train_pairs"),
    ({"stage_examples": 9}, 64, "set data.mqar.train_pairs"),
    ({}, 28, "model.vocab_size"),
  ],
)
def test_load_rejects_impossible_recall(changes, vocab, message):
  with pytest.raises(ConfigError, match=message):
    mqar.load(with_pairs(**changes), vocab)


def test_load_accepts_the_tightest_recall():
  splits = mqar.load(with_pairs(num_pairs=13), 29)
  assert splits["valid"][0]["weights"].sum() == 13
