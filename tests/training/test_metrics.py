import collections
import json
import sys
import types

import numpy as np
import pytest

from hope_jax.config import Config, ConfigError, TrainConfig
from hope_jax.training import metrics

Scalars = collections.namedtuple("Scalars", "loss accuracy")
CONFIG = Config()


def lines(folder):
  return (folder / "metrics.jsonl").read_text().splitlines()


def meter_of(writer):
  return metrics.Meter(
    writer, tokens_per_step=100, flops_per_token=7.0, peak_flops=None
  )


def test_writer_drops_what_a_resumed_run_repeats(tmp_path):
  writer = metrics.Writer(tmp_path, CONFIG, 0)
  for step in (1, 2, 3):
    writer.write("train", step, {"loss": 1.0})
  writer.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "kind": "tra')  # cut short by a crash
  writer = metrics.Writer(tmp_path, CONFIG, 2)
  writer.write("eval", 3, {"loss": 2.0, "accuracy": 0.5})
  writer.close()
  assert [json.loads(line) for line in lines(tmp_path)] == [
    {"step": 1, "kind": "train", "loss": 1.0},
    {"step": 2, "kind": "train", "loss": 1.0},
    {"step": 3, "kind": "eval", "loss": 2.0, "accuracy": 0.5},
  ]
  assert metrics.read(tmp_path) == writer.records


def test_meter_fetches_one_step_late(tmp_path):
  meter = meter_of(metrics.Writer(tmp_path, CONFIG, 0))
  meter.hold(1, Scalars(2.0, 0.5))
  assert lines(tmp_path) == []
  meter.flush()
  assert json.loads(lines(tmp_path)[0])["loss"] == 2.0
  meter.flush()
  assert len(lines(tmp_path)) == 1


def test_meter_speed_leaves_pauses_out(tmp_path, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  writer = metrics.Writer(tmp_path, CONFIG, 0)
  meter = meter_of(writer)
  now[0] = 50.0  # compilation
  meter.hold(1, Scalars(2.0, 0.5))
  meter.flush()
  for step, seconds in ((11, 10.0), (21, 5.0), (31, 4.0)):
    now[0] += 100.0
    with meter.paused():
      now[0] += 1000.0
    now[0] += seconds - 100.0
    meter.hold(step, Scalars(2.0, 0.5))
    meter.flush()
  rates = [r.get("tokens_per_second") for r in writer.records]
  assert rates == [None, 100.0, 200.0, 250.0]
  assert writer.records[1]["model_flops_per_second"] == 700.0
  assert meter.median_tokens_per_second() == 225.0
  assert writer.records[-1]["seconds"] == meter.seconds == 3069.0
  assert writer.records[-1]["tokens"] == 3100


def test_meter_forgets_what_it_holds_and_its_clock(tmp_path):
  """After a rollback: the steps made so far are made again."""
  writer = metrics.Writer(tmp_path, CONFIG, 0)
  meter = meter_of(writer)
  for number in (1, 5):
    meter.hold(number, Scalars(2.0, 0.5))
  meter.forget()
  assert meter.flush() is None
  for number in (3, 4):
    meter.hold(number, Scalars(1.0, 0.5))
  meter.flush()
  assert [(r["step"], "tokens_per_second" in r) for r in writer.records] == [
    (1, False),
    (3, False),
    (4, True),
  ]


def test_mfu_is_measured_against_the_peak(tmp_path):
  writer = metrics.Writer(tmp_path, CONFIG, 0)
  meter = metrics.Meter(
    writer, tokens_per_step=100, flops_per_token=7.0, peak_flops=350.0
  )
  for number in (1, 2):
    meter.hold(number, Scalars(2.0, 0.5))
  meter.flush()
  first, second = writer.records
  assert "mfu" not in first
  np.testing.assert_allclose(
    second["mfu"], second["tokens_per_second"] * 7.0 / 350.0
  )


def test_meter_counts_seconds_of_earlier_sessions(tmp_path):
  writer = metrics.Writer(tmp_path, CONFIG, 0)
  writer.write("train", 1, {"loss": 1.0, "seconds": 500.0})
  writer.close()
  meter = meter_of(metrics.Writer(tmp_path, CONFIG, 1))
  assert 500.0 <= meter.seconds < 501.0


def test_meter_says_what_it_wrote_and_json_has_no_nan(tmp_path):
  meter = meter_of(metrics.Writer(tmp_path, CONFIG, 0))
  assert meter.flush() is None
  meter.hold(8, Scalars(float("nan"), 0.0))
  step, values = meter.flush()
  assert step == 8 and values["tokens"]
  assert json.loads(lines(tmp_path)[0])["loss"] is None


def test_lines_that_are_no_records_are_left_out(tmp_path):
  good = [
    {"step": 1, "kind": "train", "loss": 1.0, "seconds": 2.0},
    {"step": 1, "kind": "eval", "split": "valid", "loss": None},
    {"step": 1, "kind": "dynamics", "dynamics/layer_0/memory/x": 1e3},
    {"step": 1, "kind": "rollback", "offset": 3},
  ]
  bad = [
    {"step": "1", "kind": "train", "loss": 1.0},
    {"step": True, "kind": "train", "loss": 1.0},
    {"step": 1.0, "kind": "train", "loss": 1.0},
    {"step": 1, "kind": 3, "loss": 1.0},
    {"step": 1, "kind": "train"},
    {"step": 1, "kind": "train", "loss": "low"},
    {"step": 1, "kind": "train", "loss": 1.0, "seconds": [2.0]},
    {"step": 1, "kind": "eval", "split": "valid", "loss": {}},
    ["step", "kind"],
  ]
  text = "".join(json.dumps(line) + "\n" for line in [*bad, *good])
  nan = '{"step": 2, "kind": "train", "loss": NaN, "seconds": 1e999}\n'
  (tmp_path / "metrics.jsonl").write_text(text + nan + "[" * 100_000 + "\n")
  last = {"step": 2, "kind": "train", "loss": None, "seconds": None}
  assert metrics.read(tmp_path) == [*good, last]
  writer = metrics.Writer(tmp_path, CONFIG, 9)
  assert 2.0 <= meter_of(writer).seconds < 3.0
  assert writer.find("eval", 1, "valid")["loss"] is None
  assert writer.find("eval", 1, "test") is None


def test_speed_is_zero_where_the_records_were_lost(tmp_path):
  writer = metrics.Writer(tmp_path, CONFIG, 0)
  assert meter_of(writer).median_tokens_per_second() == 0.0
  writer.write("train", 1, {"loss": 1.0})
  assert meter_of(writer).median_tokens_per_second() == 0.0
  writer.write("train", 2, {"loss": 1.0, "tokens": 300, "seconds": 2.0})
  assert meter_of(writer).median_tokens_per_second() == 150.0


def test_training_goes_on_without_a_wandb_that_fails(
  tmp_path, monkeypatch, capsys
):
  class Run:
    def log(self, *args, **kwargs):
      raise ConnectionError("no network")

  fake = types.SimpleNamespace(init=lambda **kwargs: Run())
  monkeypatch.setitem(sys.modules, "wandb", fake)
  config = Config(train=TrainConfig(wandb="offline"))
  writer = metrics.Writer(tmp_path, config, 0)
  for step in (1, 2):
    writer.write("train", step, {"loss": 1.0})
  writer.close()
  assert len(lines(tmp_path)) == 2
  assert capsys.readouterr().err.count("wandb failed and is left out") == 1


def test_wandb_is_optional_and_clearly_missed(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  metrics.Writer(tmp_path, CONFIG, 0).close()
  online = Config(train=TrainConfig(wandb="online"))
  with pytest.raises(ConfigError, match="pip install wandb"):
    metrics.Writer(tmp_path, online, 0)


def test_wandb_gets_the_same_records(tmp_path, monkeypatch):
  """A stand-in module; the calls are those of the real one's documents."""
  logged, started = [], []

  def init(**options):
    started.append(options)
    log = types.SimpleNamespace(
      log=lambda values, step: logged.append((step, values)),
      finish=lambda: logged.append("end"),
    )
    return log

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
  offline = Config(train=TrainConfig(wandb="offline"))
  for _ in range(2):
    writer = metrics.Writer(tmp_path, offline, 0)
    writer.write("train", 3, {"loss": 1.0})
    writer.write("eval", 3, {"split": "test", "loss": 2.0, "accuracy": 0.5})
    writer.write("dynamics", 3, {"dynamics/layer_0/memory/loss": 3.0})
    writer.close()
  once = [
    (3, {"train/loss": 1.0}),
    (3, {"eval/test/loss": 2.0, "eval/test/accuracy": 0.5}),
    (3, {"dynamics/layer_0/memory/loss": 3.0}),
    "end",
  ]
  assert logged == 2 * once
  assert started[0]["mode"] == "offline"
  assert started[0]["id"] == started[1]["id"]  # a resumed run continues
