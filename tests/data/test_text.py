import collections
import dataclasses
import os

import numpy as np
import pytest

from hope_jax.config import ConfigError, DataConfig, TextConfig
from hope_jax.data import text

CONFIG = DataConfig(sequence_length=10, seed=3)


def with_file(tmp_path, content, split=None, **changes):
  path = tmp_path / "some.txt"
  path.write_bytes(content)
  text = TextConfig(split=split) if split else TextConfig()
  return dataclasses.replace(CONFIG, path=str(path), text=text, **changes)


def counting(length):
  return np.arange(length, dtype=np.int64)


def test_eval_windows_cover_every_target_once():
  windows = text.EvalWindows(counting(95), 10)
  targets = [
    target
    for window in (windows[i] for i in range(len(windows)))
    for target, weight in zip(window["targets"], window["weights"], strict=True)
    if weight
  ]
  np.testing.assert_array_equal(targets, np.arange(1, 95))
  assert {len(windows[i]["tokens"]) for i in range(len(windows))} == {10}


def test_eval_windows_target_follows_token():
  window = text.EvalWindows(counting(95), 10)[3]
  np.testing.assert_array_equal(window["targets"], window["tokens"] + 1)


def test_train_windows_target_follows_token():
  windows = text.TrainWindows(counting(203), 10, seed=0)
  for index in range(60):
    window = windows[index]
    np.testing.assert_array_equal(window["tokens"] + 1, window["targets"])
    assert window["weights"].sum() == 10


def test_train_windows_epoch_has_each_window_once():
  windows = text.TrainWindows(counting(203), 10, seed=0)
  for epoch in range(3):
    seen = collections.Counter()
    for index in range(19 * epoch, 19 * (epoch + 1)):
      seen.update(windows[index]["targets"].tolist())
    assert set(seen.values()) == {1} and len(seen) == 190


def test_train_windows_epochs_differ_in_order_and_offset():
  windows = text.TrainWindows(counting(2003), 10, seed=0)
  starts = np.array([windows[i]["tokens"][0] for i in range(4 * 199)])
  epochs = starts.reshape(4, 199)
  assert len({int(epoch.min()) for epoch in epochs}) > 1
  assert len({tuple(np.argsort(epoch)) for epoch in epochs}) == 4


def test_train_windows_depend_on_seed_alone():
  a, b = (text.TrainWindows(counting(203), 10, seed=1) for _ in range(2))
  other = text.TrainWindows(counting(203), 10, seed=2)
  late = b[50]["tokens"]  # out of order: no hidden state
  np.testing.assert_array_equal([a[i]["tokens"] for i in range(60)][50], late)
  assert any((a[i]["tokens"] != other[i]["tokens"]).any() for i in range(9))


def test_read_splits_by_position(tmp_path):
  content = bytes(range(32, 132 - 5)) + b"12345"
  splits = text.read_splits(with_file(tmp_path, content, split=(0.8, 0.1)))
  assert [len(splits[name]) for name in text.SPLITS] == [80, 10, 10]
  joined = b"".join(splits[name].tobytes() for name in text.SPLITS)
  assert joined == content


def test_read_splits_of_several_files_and_of_a_folder(tmp_path):
  for name in text.SPLITS:
    (tmp_path / f"{name}.txt").write_text(name * 30)
  paths = ",".join(str(tmp_path / f"{name}.txt") for name in text.SPLITS)
  joined = text.read_splits(dataclasses.replace(CONFIG, path=paths))
  whole = b"".join(joined[name].tobytes() for name in text.SPLITS)
  assert whole == b"".join(name.encode() * 30 for name in text.SPLITS)
  folder = text.read_splits(dataclasses.replace(CONFIG, path=str(tmp_path)))
  assert folder["valid"].tobytes() == b"valid" * 30


def test_find_looks_beside_the_repository(tmp_path):
  here = os.getcwd()
  os.chdir(tmp_path)
  try:
    splits = text.read_splits(DataConfig())
  finally:
    os.chdir(here)
  assert sum(len(split) for split in splits.values()) == 1115394


@pytest.mark.parametrize(
  ("content", "changes", "message"),
  [
    (b"abc\xff" + b"d" * 400, {}, "byte 3"),
    (b"", {}, "empty"),
    (b"short", {}, "train split"),
    (b"x" * 400, {"split": (0.9, 0.1)}, "data.text.split"),
    (b"x" * 400, {"split": (0.9,)}, "data.text.split"),
  ],
)
def test_load_rejects_unusable_text(tmp_path, content, changes, message):
  with pytest.raises(ConfigError, match=message):
    text.load(with_file(tmp_path, content, **changes), 256)


def test_load_needs_two_windows_of_training_text(tmp_path):
  enough = with_file(tmp_path, b"x" * 40, split=(0.5, 0.25))
  assert text.load(enough, 256)["train"][7]["tokens"].shape == (10,)
  short = with_file(tmp_path, b"x" * 38, split=(0.5, 0.25))
  with pytest.raises(ConfigError, match="19 tokens .*, fewer than the 20"):
    text.load(short, 256)


def test_load_rejects_missing_file_and_small_vocabulary(tmp_path):
  missing = dataclasses.replace(CONFIG, path=str(tmp_path / "none.txt"))
  with pytest.raises(ConfigError, match="none.txt"):
    text.load(missing, 256)
  with pytest.raises(ConfigError, match="model.vocab_size"):
    text.load(with_file(tmp_path, b"x" * 400), 255)
