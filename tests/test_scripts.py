"""The measuring scripts measure what they say."""

import argparse
import importlib
import importlib.util

import jax
import pytest

from experiments.lib import timing
from hope_jax.config import from_config_dict
from scripts import (
  backward_memory,
  benchmark,
  benchmark_memory,
  benchmark_titans_pytorch,
)
from tests.support.tiers import slow_case


@pytest.mark.parametrize("policy", ["chunk", "sqrt"])
def test_saved_states_of_a_real_memory_follow_the_policy(policy):
  # 128 chunks of 64 tokens: 10 groups of 12, and 8 chunks by themselves; M_0,
  # which has no momentum, is half a state, and a scan holds it per sequence.
  expected = {"chunk": 128.5, "sqrt": 10 + 8.5}
  assert backward_memory.saved_states(8192, policy) == expected[policy]


def test_backward_memory_prints_a_table_and_plots(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(backward_memory, "LENGTHS", (128, 256))
  backward_memory.main([f"--plot={tmp_path / 'curve.png'}"])
  shown = capsys.readouterr().out.splitlines()
  assert [line.split("|")[1].strip() for line in shown[2:4]] == ["128", "256"]
  assert (tmp_path / "curve.png").stat().st_size > 1000


@pytest.mark.parametrize("config", benchmark.CONFIGS)
def test_benchmark_times_the_models_of_the_result_tables(config):
  flags = argparse.Namespace(batch=None, length=None, dtype="float32")
  make = lambda name: benchmark.make_config(config, name, flags)
  assert make("hope").model.cms.signal == "next_token"
  assert make("hope").model.inner_rates == "on"
  assert make("hope_twin").model.inner_rates == "off"
  assert make("hope_associative").model.cms.signal == "associative"
  if config != "3p9m":
    module = importlib.import_module(f"configs.{config}")
    assert make("hope") == from_config_dict(module.get_config("hope"))
  flags.batch, flags.length = 3, 2048
  data = make("hope").data
  assert (data.batch_size, data.sequence_length) == (3, 2048)


def test_calls_take_turns_and_warm_up():
  made = []
  calls = {name: lambda name=name: made.append(name) for name in "ab"}
  seconds = timing.in_turn(calls, 2)
  assert made == list("ababab")
  assert {name: len(times) for name, times in seconds.items()} == dict(a=2, b=2)


SMALL = ["--lengths=48", "--chunks=16", "--tokens=96", "--heads=1", "--dim=8"]


@pytest.mark.parametrize(
  "layers", [("linear_rule", "attention"), slow_case(benchmark_memory.LAYERS)]
)
def test_benchmark_memory_times_layers(monkeypatch, capsys, layers):
  rates = benchmark_memory.Rates(1e9, 1e9)
  monkeypatch.setattr(benchmark_memory, "measure_rates", lambda *_: rates)
  benchmark_memory.main([*SMALL, "--rounds=1", f"--layers={','.join(layers)}"])
  shown = capsys.readouterr().out.splitlines()
  cells = [[c.strip() for c in line.split("|")[1:-1]] for line in shown[2:]]
  cells = cells[: len(layers)]
  assert tuple(row[0] for row in cells) == layers
  assert all(row[2] == "2 x 48" and float(row[4]) > 0 for row in cells)


def test_benchmark_memory_leaves_out_what_does_not_fit(monkeypatch, capsys):
  rates = benchmark_memory.Rates(1e9, 1e9)
  monkeypatch.setattr(benchmark_memory, "measure_rates", lambda *_: rates)
  benchmark_memory.main([*SMALL, "--gib=0", "--layers=attention"])
  assert capsys.readouterr().out.count("memory") == 2


def test_benchmark_memory_rejects_an_unknown_layer(capsys):
  with pytest.raises(SystemExit):
    benchmark_memory.main(["--layers=titan"])
  assert "titan is not one of titans, hope" in capsys.readouterr().err


def test_floor_is_the_dearer_of_products_and_bytes():
  x = benchmark_memory.make_tokens(2, 1, 32, 8)
  variant = benchmark_memory.Variant("attention", "xla", 0)
  floors = [
    benchmark_memory.floor_seconds(variant, x, benchmark_memory.Rates(*rates))
    for rates in ((1.0, float("inf")), (float("inf"), 1.0))
  ]
  product = 2 * 2 * 32 * 32 * 8  # of all rows with all keys
  assert [floor["forward"] for floor in floors] == [
    2 * product,
    4 * (4 * 2 * 32 * 8 + 3 * 2 * 32),  # q, k, v, o and the gates, which
  ]  # attention is given too
  assert floors[0]["both"] == 6 * product
  assert floors[1]["both"] == 2 * floors[1]["forward"]


@pytest.mark.parametrize(
  ("backend", "platform", "call"),
  [("tpu", "tpu", "tpu_custom_call"), ("gpu", "cuda", "triton")],
)
def test_variants_of_a_backend_are_its_kernels(backend, platform, call):
  chosen = benchmark_memory.variants(benchmark_memory.LAYERS, [16], backend)
  kernels = [v for v in chosen if v.implementation != "xla"]
  assert {v.layer for v in kernels} == set(benchmark_memory.KERNELS[backend])
  x = benchmark_memory.make_tokens(1, 1, 32, 16)
  for variant in kernels:
    run = jax.jit(benchmark_memory.make_layer(*variant))
    initial = benchmark_memory.initial_state(variant.layer, 1, 16)
    traced = run.trace(initial, x)
    assert call in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.skipif(
  importlib.util.find_spec("torch") is not None, reason="torch is installed"
)
def test_comparison_says_what_to_install(capsys):
  with pytest.raises(SystemExit):
    benchmark_titans_pytorch.main([])
  assert "pip install '.[bench]'" in capsys.readouterr().err


def test_comparison_runs_where_torch_is_installed(capsys):
  pytest.importorskip("titans_pytorch")
  small = ["--length=32", "--batch=1", "--rounds=1", "--chunks=16"]
  benchmark_titans_pytorch.main(small)
  assert capsys.readouterr().out.count("titans-pytorch") == 2


@pytest.mark.parametrize("name", ["hope_jax", "chunk reads"])
def test_our_side_of_the_comparison_is_a_whole_layer(name):
  config = benchmark_titans_pytorch.make_config(16)
  if name == "chunk reads":
    config = benchmark_titans_pytorch.chunk_reads(config)
    assert (config.conv_window, config.memory.read) == (0, "chunk")
  loss, grads = benchmark_titans_pytorch.ours(config, (1, 32, 256))()
  assert loss > 0 and grads[1].shape == (1, 32, 256)
  assert {"projections", "gates", "initial", "readout"} == set(grads[0])
