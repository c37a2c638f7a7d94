import pickle

import numpy as np
import pytest

from hope_jax.config import ConfigError
from hope_jax.data import lanes

COUNT, ROWS = 11, 3
STEPS = COUNT // ROWS  # of an epoch


def examples(segments=True):
  """Example i has token i; half of it goes on, then its document 1 begins."""
  found = [{"tokens": np.full(4, i, np.int32)} for i in range(COUNT)]
  for example in found if segments else []:
    example["segments"] = np.array([0, 0, 1, 1], np.int32)
  return found


def numbers(source, epoch):
  """[rows, steps]: which examples the rows of an epoch read."""
  first = epoch * STEPS * ROWS
  read = [source[first + i]["tokens"][0] for i in range(STEPS * ROWS)]
  return np.reshape(read, (STEPS, ROWS)).T


@pytest.mark.parametrize("epoch", range(8))
def test_rows_read_consecutive_examples_and_share_none(epoch):
  read = numbers(lanes.Lanes(examples(), ROWS, seed=0), epoch)
  assert (np.diff(read, axis=1) % COUNT == 1).all()
  assert len(np.unique(read)) == STEPS * ROWS


@pytest.mark.parametrize("segments", [True, False])
def test_a_document_begins_at_a_lane_and_at_the_corpus_and_nowhere_else(
  segments,
):
  source = lanes.Lanes(examples(segments), ROWS, seed=0)
  wrapped = 0
  for index in range(12 * STEPS * ROWS):
    example = source[index]
    is_wrap = example["tokens"][0] == 0
    is_lane = index % (STEPS * ROWS) < ROWS
    wrapped += is_wrap and not is_lane
    before = np.array([0, 0, 1, 1] if segments else [0, 0, 0, 0])
    expected = before + 1 if is_wrap or is_lane else before
    np.testing.assert_array_equal(example["segments"], expected)
  assert wrapped > 3  # inside of a lane, where nothing else would show it


def test_every_epoch_cuts_at_another_place():
  source = lanes.Lanes(examples(), ROWS, seed=0)
  starts = [numbers(source, epoch)[0, 0] for epoch in range(12)]
  assert len(set(starts)) > 4
  again = lanes.Lanes(examples(), ROWS, seed=0)
  assert starts == [numbers(again, epoch)[0, 0] for epoch in range(12)]
  other = lanes.Lanes(examples(), ROWS, seed=1)
  assert starts != [numbers(other, epoch)[0, 0] for epoch in range(12)]


def test_examples_themselves_stay_as_they_are():
  held = examples()
  source = lanes.Lanes(held, ROWS, seed=0)
  for index in range(2 * STEPS * ROWS):
    _ = source[index]
  for example in held:
    np.testing.assert_array_equal(example["segments"], [0, 0, 1, 1])


def test_lanes_travel_to_a_worker():
  source = lanes.Lanes(examples(), ROWS, seed=5)
  there = pickle.loads(pickle.dumps(source))
  for index in range(3 * STEPS * ROWS):
    np.testing.assert_array_equal(
      there[index]["tokens"], source[index]["tokens"]
    )


def test_a_row_needs_an_example():
  assert lanes.Lanes(examples(), COUNT, seed=0)[0]["tokens"].shape == (4,)
  with pytest.raises(ConfigError, match="batch_size=12 .* split has 11"):
    lanes.Lanes(examples(), COUNT + 1, seed=0)
