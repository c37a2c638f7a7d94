import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from hope_jax.config import (
  CMSConfig,
  DataConfig,
  MemoryConfig,
  MeshConfig,
  ModelConfig,
)
from hope_jax.data import pipeline
from hope_jax.models import language_model
from hope_jax.runs import checkpoints
from hope_jax.training import sharding, step
from tests.support.jit import fast_compile, fast_jit
from tests.support.tiers import slow_case

# Recorded on a CPU with jax 0.10.2; see CHANGELOG before changing them.
GOLDEN_LOSS = [5.549557, 5.488030]
GOLDEN_GRAD_NORM = [0.748751, 0.896598]


@functools.lru_cache
def build(config):
  """What tests share: compiling takes most of their time."""
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  return step.build(config, mesh), mesh, pipeline.load(config)["train"]


def start(config):
  """(compiled, mesh, state, function from step number to batch)."""
  compiled, mesh, source = build(config)
  size = config.data.batch_size
  batches = pipeline.TrainBatches(source, size, (0, size), 100)
  with sharding.activate(mesh):
    state = compiled.init(jax.random.key(config.train.seed))

  def batch(number):
    return sharding.put_batch(batches[number], mesh, size, (0, size))

  return compiled, mesh, state, batch


def run(config, steps):
  compiled, mesh, state, batch = start(config)
  metrics = []
  with sharding.activate(mesh):
    for number in range(steps):
      state, scalars = compiled.train_step(state, batch(number))
      metrics.append(jax.device_get(scalars))
  return state, metrics, compiled


def recall(config):
  """The same run on MQAR, where rows differ in their weights' positions."""
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, vocab_size=65),
    data=DataConfig(kind="mqar", sequence_length=32, batch_size=4),
  )


def test_train_step_golden_first_steps(tiny):
  state, metrics, _ = run(tiny, 2)
  assert int(state.step) == 2
  np.testing.assert_allclose([m.lr for m in metrics], [5e-3, 1e-2], rtol=1e-5)
  np.testing.assert_allclose([m.loss for m in metrics], GOLDEN_LOSS, rtol=1e-5)
  np.testing.assert_allclose(
    [m.grad_norm for m in metrics], GOLDEN_GRAD_NORM, rtol=1e-4
  )


def test_train_step_does_not_recompile(tiny):
  _, _, compiled = run(tiny, 3)
  assert compiled.train_step._cache_size() == 1


def test_train_step_learns(tiny):
  _, metrics, _ = run(tiny, 60)
  assert metrics[-1].loss < metrics[0].loss - 1.0


@pytest.mark.parametrize("parts", [slow_case(2), 4])
def test_accumulate_equals_one_batch(tiny, parts):
  config = recall(tiny)
  train = dataclasses.replace(config.train, accumulate=parts)
  one, metrics, _ = run(config, 2)
  many, split_metrics, _ = run(dataclasses.replace(config, train=train), 2)
  np.testing.assert_allclose(metrics, split_metrics, rtol=1e-5)
  # Adam divides by the gradient's size: compare moments, not parameters.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    one.opt_state,
    many.opt_state,
  )


def test_accumulate_weights_parts_by_their_targets(tiny):
  """Parts with unequal sums of weights, which equal means would get wrong."""
  compiled, mesh, state, batch = start(tiny)
  train = dataclasses.replace(tiny.train, accumulate=2)
  split, _, split_state, _ = start(dataclasses.replace(tiny, train=train))
  uneven = batch(0)
  uneven["weights"] = jax.device_put(
    uneven["weights"].at[::2, 4:].set(0.0), sharding.batch_sharding(mesh)
  )
  with sharding.activate(mesh):
    _, want = compiled.train_step(state, uneven)
    _, got = split.train_step(split_state, uneven)
  np.testing.assert_allclose(want, got, rtol=1e-5)


def test_loss_is_the_weighted_mean(tiny):
  compiled, mesh, state, batch = start(recall(tiny))
  example = batch(0)
  with sharding.activate(mesh):
    positions = compiled.eval_step(state.params, example)
  assert positions.loss.shape == example["tokens"].shape[1:]
  sums = jax.tree.map(jnp.sum, positions)
  model = step.LanguageModel(recall(tiny).model)
  logits = language_model.forward(model, state.params, example["tokens"]).logits
  logp = np.asarray(jax.nn.log_softmax(logits), np.float64)
  rows, columns = np.nonzero(np.asarray(example["weights"]))
  targets = np.asarray(example["targets"])[rows, columns]
  np.testing.assert_allclose(
    sums.loss, -logp[rows, columns, targets].sum(), rtol=1e-5
  )
  hits = np.asarray(jnp.argmax(logits, -1))[rows, columns] == targets
  np.testing.assert_allclose(sums.correct, hits.sum())
  assert sums.weight == len(rows) == 4 * 8


def test_bfloat16_keeps_state_and_loss_in_float32(tiny):
  model = dataclasses.replace(tiny.model, dtype="bfloat16")
  config = dataclasses.replace(tiny, model=model)
  state, metrics, _ = run(config, 2)
  kinds = {x.dtype.name for x in jax.tree.leaves(state)}
  assert kinds == {"float32", "int32"}
  np.testing.assert_allclose(metrics[0].loss, GOLDEN_LOSS[0], rtol=2e-2)
  assert metrics[0].loss.dtype == np.float32


def test_seed_changes_the_initial_state(tiny):
  other = dataclasses.replace(tiny.train, seed=1)
  _, first, _ = run(tiny, 1)
  _, second, _ = run(dataclasses.replace(tiny, train=other), 1)
  assert first[0].loss != second[0].loss


class Toy(NamedTuple):
  """A model's output: logits are rows of a table."""

  logits: Any
  state: Any


def toy_step(monkeypatch, weights, clock=1.0):
  """One update of a table, of a model that counts in its fast state."""

  def forward(model, params, tokens, state, documents):
    del model, documents
    logits = params["table"][tokens] + jnp.sqrt(params["clock"])
    return Toy(logits, state + 1)

  monkeypatch.setattr(step.language_model, "forward", forward)
  optimizer = optax.adam(0.1)
  draw = np.random.default_rng(0).normal(size=(5, 5))
  params = {"table": jnp.asarray(draw, jnp.float32), "clock": jnp.array(clock)}
  zero = jnp.zeros((), jnp.int32)
  state = step.TrainState(
    step=zero,
    params=params,
    opt_state=optimizer.init(params),
    fast=jnp.array(7),
    bad=zero + 3,
    bad_in_a_row=zero + 2,
    offset=zero + 4,
  )
  hit = draw[1].argmax()  # where a test has weight 0
  batch = {
    "tokens": jnp.array([[0, 1, 2, 3]]),
    "targets": jnp.array([[1, hit, 3, 4]]),
    "weights": jnp.asarray(weights, jnp.float32)[None],
  }
  after, metrics = step._train_step(
    state,
    batch,
    model=None,
    optimizer=optimizer,
    rate=lambda count: 0.1,
    accumulate=1,
  )
  assert (after.step, after.offset) == (1, 4)
  assert (metrics.bad, metrics.bad_in_a_row) == (after.bad, after.bad_in_a_row)
  return state, after, metrics


def test_good_step_changes_all_and_ends_the_bad_ones(monkeypatch):
  state, after, metrics = toy_step(monkeypatch, [1.0, 0.0, 1.0, 1.0])
  assert (after.bad, after.bad_in_a_row, after.fast) == (3, 0, 8)
  assert (after.params["table"] != state.params["table"]).any()
  assert after.opt_state[0].count == 1
  assert np.isfinite(metrics.loss) and np.isfinite(metrics.grad_norm)
  logits = np.asarray(state.params["table"])[[0, 2, 3]]
  hits = logits.argmax(axis=1) == [1, 3, 4]
  np.testing.assert_allclose(metrics.accuracy, hits.mean(), rtol=1e-6)


@pytest.mark.parametrize(
  ("weights", "clock", "is_loss_finite"),
  [([1.0, 1.0, np.nan, 1.0], 1.0, False), ([1.0] * 4, 0.0, True)],
)
def test_bad_step_changes_nothing_but_its_counts(
  monkeypatch, weights, clock, is_loss_finite
):
  """The loss is not finite, or the gradient only (that of sqrt at 0)."""
  state, after, metrics = toy_step(monkeypatch, weights, clock)
  assert np.isfinite(metrics.loss) == is_loss_finite
  assert not np.isfinite(metrics.grad_norm)
  assert (after.bad, after.bad_in_a_row) == (4, 3)
  kept = lambda s: (s.params, s.opt_state, s.fast)
  jax.tree.map(np.testing.assert_array_equal, kept(after), kept(state))


def test_count_parameters_counts_all(tiny):
  _, _, state, _ = start(tiny)
  width, hidden = 16, 32
  block = 4 * width**2 + 3 * 4 * width + 3 * width * hidden + 2 * width
  want = 256 * width + 2 * block + width
  assert step.count_parameters(state.params) == want


def test_build_allocates_nothing(tiny):
  model = ModelConfig(width=2**14, num_layers=64, num_heads=128)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  config = dataclasses.replace(tiny, model=model)
  abstract = step.build(config, mesh).abstract_state
  assert step.count_parameters(abstract.params) > 2**36


def carrying(config, name="hope", accumulate=1, slowest=64):
  """Hardly any learning, so that all steps are one pass of one model."""
  model = dataclasses.replace(
    config.model,
    sequence_layer=name,
    memory=MemoryConfig(chunk_length=4, projection_chunk_length=8),
    cms=CMSConfig(hidden=(8, 8, 16), chunk_lengths=(8, slowest, 0)),
  )
  train = dataclasses.replace(
    config.train, carry_state=True, accumulate=accumulate
  )
  opt = dataclasses.replace(config.opt, peak_lr=1e-30)
  return dataclasses.replace(config, model=model, opt=opt, train=train)


@pytest.mark.parametrize(
  ("name", "accumulate"), [slow_case("titans", 1), ("hope", 2)]
)
def test_carried_state_equals_the_uncut_pass(tiny, name, accumulate):
  config = carrying(tiny, name, accumulate)
  compiled, mesh, state, batch = start(config)
  batches = [batch(number) for number in range(3)]
  losses = []
  with sharding.activate(mesh):
    train_step = fast_compile(compiled.train_step, state, batches[0])
    for each in batches:
      state, scalars = train_step(state, each)
      losses.append(float(scalars.loss))
    joined = {
      key: jnp.concatenate([each[key] for each in batches], axis=1)
      for key in batches[0]
    }
    whole = language_model.LanguageModel(config.model)
    forward = fast_jit(
      lambda *args: language_model.forward(whole, *args).logits
    )
    logits = forward(state.params, joined["tokens"])
  loss = optax.softmax_cross_entropy_with_integer_labels(
    logits, joined["targets"]
  )
  expected = [float(part.mean()) for part in jnp.split(loss, 3, axis=1)]
  np.testing.assert_allclose(losses, expected, rtol=2e-5)
  assert jnp.abs(jnp.diff(loss.mean(axis=0))).max() > 0


def test_carried_state_ends_with_its_document(tiny):
  config = carrying(tiny, slowest=32)
  compiled, mesh, state, batch = start(config)
  first, second = batch(0), batch(1)
  new = {**second, "segments": second["segments"] + 1}
  with sharding.activate(mesh):
    train_step = fast_compile(compiled.train_step, state, new)
    fresh, _ = train_step(jax.tree.map(jnp.copy, state), new)
    state, _ = train_step(state, first)
    state, _ = train_step(state, new)
  for a, b in zip(
    jax.tree.leaves(state.fast), jax.tree.leaves(fresh.fast), strict=True
  ):
    if a.ndim > 1:
      np.testing.assert_allclose(a, b, atol=1e-6)


PERIODS = {"1": 1, "2": 2, "3": 3, "4": 1}  # by level, the last one never


def with_periods(config):
  """Hope-Attention with levels that change after 1, 2 and 3 steps."""
  tokens = config.data.batch_size * config.data.sequence_length
  model = dataclasses.replace(
    config.model,
    sequence_layer="hope_attention",
    cms=CMSConfig(
      hidden=(8,) * 5,
      chunk_lengths=(8, tokens, 2 * tokens, 3 * tokens, 0),
      connection="independent",
      step_tokens=tokens,
    ),
  )
  return dataclasses.replace(config, model=model)


def named(params):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): value
    for path, value in jax.tree_util.tree_leaves_with_path(params)
  }


def test_levels_of_a_period_change_at_its_end_only(tiny, tmp_path):
  """Be it that a checkpoint and a skipped step come in the middle of it."""
  config = with_periods(tiny)
  compiled, mesh, state, batch = start(config)
  manager = checkpoints.open_manager(epath.Path(tmp_path), config.train)
  with sharding.activate(mesh):
    train_step = fast_compile(compiled.train_step, state, batch(0))

    def go_on(state, first):
      states = [jax.device_get(state)]
      for number in range(first, 6):
        state, _ = train_step(state, batch(number))
        states.append(jax.device_get(state))
        if number == 0:
          checkpoints.save(manager, 1, state, 1.0)
      return states

    states = go_on(state, 0)
    restored = checkpoints.restore(manager, compiled.abstract_state)
    bad = batch(1) | {"weights": batch(1)["weights"] * np.nan}
    restored, scalars = train_step(restored, bad)
    again = go_on(restored, 1)
  checkpoints.close(manager)
  assert scalars.bad == 1
  kept = lambda state: (state.params, state.opt_state)
  jax.tree.map(np.testing.assert_array_equal, kept(again[-1]), kept(states[-1]))
  seen = set()
  for number in range(6):
    old, new = (named(s.params) for s in states[number : number + 2])
    for name in old:
      kind, _, level = f"{name}//".split("/")[2].rpartition("_")
      is_level = name.startswith("blocks/cms") and level in PERIODS
      every = PERIODS[level] if is_level else 1
      seen |= {(kind, level)} if is_level else set()
      changes = (old[name] != new[name]).any()
      assert changes == ((number + 1) % every == 0), (name, number)
  assert len(seen) == 3 * len(PERIODS)  # block, norm and share
