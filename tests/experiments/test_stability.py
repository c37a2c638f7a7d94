"""The stability experiment: critical rates, streams, literal settings."""

import dataclasses
import functools
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments.stability import battery, rates, reading, run
from hope_jax import config as config_lib
from hope_jax.config import ConfigError, ModelConfig
from hope_jax.memory import chunks
from hope_jax.models import fast_state, language_model
from hope_jax.runs import checkpoints
from hope_jax.runs import workdir as workdir_lib

L2_HALF, L2, L2_SUM, DOT = rates.RULES


@pytest.mark.parametrize(
  ("rule", "chunk_length", "momentum", "rate"),
  [
    # u = -v whatever D is: D <- (1 - eta') D.
    (DOT, 4, 0.5, 2.0),
    # D <- (1 - eta') D + S, S <- beta S - (1 - beta) eta' f D, f = 1: an
    # eigenvalue is -1 at eta' = 2 (1 + beta) / (1 + f (1 - beta) + beta).
    (L2_HALF, 1, 0.0, 1.0),
    (L2_HALF, 1, 0.5, 1.5),
    # No momentum, errors of the first state: with e = 1 - r eta' over C tokens
    # D <- (e^C - f (1 - e^C) / r) D, r = 1.
    (L2_SUM, 4, 0.0, 1 - (1 / 3) ** (1 / 4)),
  ],
)
def test_critical_rate_is_the_analytic_one(rule, chunk_length, momentum, rate):
  found = rates.critical_rate(rule, chunk_length, momentum)
  np.testing.assert_allclose(found, rate, rtol=1e-4)


def test_critical_rate_none_below_the_limit():
  assert rates.critical_rate(L2_HALF, 4, 0.5, limit=2.0) is None


def _run_tokens(rate: float, momentum: float, count: int) -> float:
  """|D| + |S| after `count` chunks of 4 tokens, rule L2 both / C, by hand."""
  weight, velocity, step = 1.0, 0.0, rate / 4
  for _ in range(count):
    error = 2.0 * weight  # at the chunk's first state
    for _ in range(4):
      velocity = momentum * velocity - (1 - momentum) * step * error
      weight = weight * (1 - step) + velocity
  return abs(weight) + abs(velocity)


def test_critical_rate_separates_decay_from_growth():
  rate = rates.critical_rate(L2, 4, 0.5)
  assert rate is not None
  assert _run_tokens(0.98 * rate, 0.5, 400) < 1e-2
  assert _run_tokens(1.02 * rate, 0.5, 400) > 1e2


@pytest.mark.parametrize(
  ("found", "expected", "agrees"),
  [
    (0.667, ".67", True),
    (0.68, ".67", False),
    (1.81, "1.8", True),
    (2.0, "2", True),
    (2.2, "2", False),
    (2.5, ">2", True),
    (1.9, ">2", False),
    (None, ">2", True),
    (None, "2", False),
  ],
)
def test_agrees_to_the_expected_digits(found, expected, agrees):
  assert rates.agrees(found, expected) is agrees


def _small(model: str) -> ModelConfig:
  """One narrow layer of a model of the experiment."""
  full = reading.default_config(model).model
  cms = dataclasses.replace(full.cms, hidden=tuple(8 for _ in full.cms.hidden))
  return dataclasses.replace(
    full, width=16, num_layers=1, ffn_hidden=16, cms=cms
  )


@pytest.fixture(scope="module")
def titans() -> reading.Source:
  return reading.initial_source("titans", _small("titans"))


def _broken(source: reading.Source) -> reading.Source:
  """Without a finite embedding of the repeated token."""
  table = np.array(source.params["embed"]["embedding"])
  table[reading.REPEATED] = np.nan
  params = {**source.params, "embed": {"embedding": table}}
  return source._replace(params=params)


@pytest.fixture(scope="module")
def text() -> np.ndarray:
  return reading.held_out()


def test_with_chunk_keeps_the_ratios():
  config = reading.default_config("hope").model
  scaled = reading.with_chunk(config, 64)
  assert scaled.memory.chunk_length == 64
  assert scaled.memory.projection_chunk_length == 256
  assert scaled.cms.chunk_lengths == (256, 1024, 0)
  cms = dataclasses.replace(
    config.cms, chunk_lengths=(64, 128, 4096), step_tokens=2048
  )
  seldom = dataclasses.replace(config, cms=cms)
  assert config.memory.chunk_length == 16
  found = reading.with_chunk(seldom, 64).cms
  assert found.chunk_lengths == (256, 512, 4096)  # the optimizer's stays
  memory = dataclasses.replace(scaled.memory, projection_chunk_length=96)
  odd = dataclasses.replace(scaled, memory=memory)
  with pytest.raises(ConfigError, match="no whole length"):
    reading.with_chunk(odd, 1)


def test_streams_differ_where_they_should(text):
  repeated, noise, real, changed = reading.streams(text, 1000, 256)
  assert len(set(repeated)) == 1
  assert len(set(noise)) > 200
  np.testing.assert_array_equal(real, text[:1000])
  assert (real[: reading.PASSAGE] != changed[: reading.PASSAGE]).any()
  np.testing.assert_array_equal(
    real[reading.PASSAGE :], changed[reading.PASSAGE :]
  )
  short = reading.streams(text[:100], 250, 256)[2]
  np.testing.assert_array_equal(short[:50], short[200:])


def test_levels_hold_every_fast_weight_once():
  config = _small("hope")
  model = language_model.LanguageModel(config)
  shapes = jax.eval_shape(
    lambda: (
      nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 16), jnp.int32))),
      language_model.init_state(config, 3, 1024),
    )
  )
  rng = np.random.default_rng(0)
  variables, state = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), shapes
  )
  found = fast_state.levels(variables["params"], state, config)
  assert tuple(found) == config.fast_levels

  def squares(trees) -> float:
    return sum(np.sum(np.square(x)) for x in jax.tree.leaves(trees))

  levels = [state.mixer.memory.now, state.mixer.boxes.now]
  levels += [chunks.Fast(level.weight) for level in state.levels.values()]
  for name in ("weight", "momentum"):
    expected = squares([getattr(level, name) for level in levels])
    total = squares([getattr(level, name) for level in found.values()])
    np.testing.assert_allclose(total, expected, rtol=1e-5)
  for level in found.values():
    starts, weights = map(jax.tree.leaves, (level.start, level.weight))
    shapes = {(x.shape[0], *x.shape[2:]) for x in weights}
    assert {x.shape for x in starts} == shapes


def test_reading_in_pieces_equals_reading_at_once(titans, text):
  tokens = reading.streams(text, 128, 256)
  read = functools.partial(
    reading.read, titans.params, tokens, config=titans.config
  )
  whole, logits = read(piece=128, at=120)
  parts, part_logits = read(piece=32, at=120)
  assert parts.size["memory"].shape == (4, len(reading.STREAMS))
  for name in ("size", "moved"):
    last = getattr(parts, name)["memory"][-1]
    np.testing.assert_allclose(
      last, getattr(whole, name)["memory"][-1], rtol=1e-4
    )
  np.testing.assert_allclose(part_logits, logits, rtol=1e-3, atol=1e-5)


def test_reading_next_token_levels(text):
  """Whose empty state shares its zeros: none may be used up twice."""
  config = _small("hope")
  cms = dataclasses.replace(config.cms, signal="next_token")
  source = reading.initial_source("hope", dataclasses.replace(config, cms=cms))
  tokens = reading.streams(text, 256, 256)[:1]
  measured, _ = reading.read(
    source.params, tokens, config=source.config, piece=128
  )
  assert measured.state_finite.all()


def test_reading_sees_what_is_not_finite(titans, text):
  tokens = reading.streams(text, 128, 256)
  params = _broken(titans).params
  measured, _ = reading.read(params, tokens, config=titans.config, piece=32)
  row = reading.STREAMS.index("repeated")
  assert not measured.state_finite[:, row].any()
  assert not measured.logits_finite.any()  # the table is also the output
  assert np.isinf(measured.size["memory"][:, row]).all()


def test_change_is_nothing_without_writes(titans, text):
  twin = dataclasses.replace(titans.config, inner_rates="off")
  measure = functools.partial(
    battery.measure, text=text, chunk_length=16, dtype="float32", count=256
  )
  live = measure(titans)
  assert live["change"] > 1e-5
  assert live["streams"]["text"]["moved"]["memory"] > 0.01
  assert measure(titans._replace(config=twin))["change"] == 0


def test_defaults_are_bounded_and_literal_settings_blow_up(titans, text):
  measure = functools.partial(
    battery.measure_literal, titans, text, chunk_length=16, chunks=16
  )
  defaults = measure(variant="defaults")
  assert defaults["first_nonfinite"] is defaults["first_large"] is None
  assert defaults["max_state"] < 1
  literal = measure(variant="all")
  assert literal["first_nonfinite"] <= 8
  assert literal["level"] == "memory"
  assert literal["growth"] is None


def _main(part: str, folder: pathlib.Path) -> dict:
  flags = [f"--part={part}", "--quick", "--model=titans", f"--out={folder}"]
  assert run.main(flags) == 0
  return json.loads((folder / f"{part}.json").read_text())["cases"]


@pytest.mark.parametrize("is_stable", [True, False])
def test_quick_battery_says_whether_all_is_finite(
  monkeypatch, titans, tmp_path, is_stable
):
  source = titans if is_stable else _broken(titans)
  monkeypatch.setattr(run, "_initial", lambda model: source)
  (case,) = _main("battery", tmp_path).values()
  repeated = case["streams"]["repeated"]
  assert repeated["state_finite"] == is_stable
  assert (repeated["max_state"] is not None) == is_stable
  words = (tmp_path / "battery.md").read_text().split()
  assert ("yes" in words, "NO" in words) == (is_stable, not is_stable)
  case["streams"]["noise"]["state_finite"] = False  # one is enough
  assert "NO" in run.battery_table({"case": case}).split()


def test_run_resumes(monkeypatch, tmp_path):
  made = []

  def measure(rule: str, chunk_length: int, momentum: float) -> dict:
    made.append((rule, chunk_length, momentum))
    if len(made) == 5:
      raise KeyboardInterrupt
    expected = {"found": 2.0, "expected": "2", "agrees": True}
    names = {"rule": rule, "chunk_length": chunk_length, "momentum": momentum}
    return names | expected

  monkeypatch.setattr(rates, "measure", measure)
  with pytest.raises(KeyboardInterrupt):
    _main("rates", tmp_path)
  assert len(_main("rates", tmp_path)) == len(made) - 1 == len(set(made)) == 24
  assert len(_main("rates", tmp_path)) == len(made) - 1 == 24
  table = (tmp_path / "rates.md").read_text()
  assert table.count("2.000 (2)") == 24


def test_trained_source_is_the_checkpoint(titans, tmp_path):
  workdir = epath.Path(tmp_path) / "small"
  config = reading.default_config("titans")
  config = dataclasses.replace(config, model=titans.config)
  workdir_lib.write_json(workdir / "config.json", config_lib.to_dict(config))
  manager = checkpoints.open_manager(workdir, config.train)
  checkpoints.save(manager, 7, {"params": titans.params})
  checkpoints.close(manager)
  source = reading.trained_source(workdir)
  assert source.model == "titans"
  assert source.weights == "small, 7 steps"
  assert source.config == titans.config
  jax.tree.map(np.testing.assert_array_equal, source.params, titans.params)


def test_a_folder_without_a_run_is_one_clear_line(tmp_path, capsys):
  flags = ["--part=battery", f"--workdir={tmp_path}", f"--out={tmp_path}"]
  assert run.main(flags) == 2
  assert "is not the folder of a run" in capsys.readouterr().err
