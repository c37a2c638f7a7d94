import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.config import DataConfig, MeshConfig, ModelConfig
from hope_jax.data import pipeline
from hope_jax.training import sharding, step

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


@pytest.mark.parametrize("parts", [2, 4])
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
    sums = compiled.eval_step(state.params, example)
  model = step.LanguageModel(recall(tiny).model)
  logits = step.forward(model, state.params, example["tokens"]).logits
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
