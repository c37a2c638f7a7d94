"""What is logged of the learning, against numbers from token loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.config import MemoryConfig
from hope_jax.memory import cms, deep, self_modifying
from tests.memory import test_cms, test_deep, test_self_modifying
from tests.support import oracle
from tests.support.jit import fast_jit

T = test_deep.T
CHUNK_LENGTH = 8  # 5 tokens in the last chunk


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def chunks_of(tokens, chunk_length):
  return [slice(i, i + chunk_length) for i in range(0, tokens, chunk_length)]


def at_borders(initial, path, tokens, chunk_length):
  """Per chunk: the weights it began with and those it left behind."""
  ends = [min(s.stop, tokens) - 1 for s in chunks_of(tokens, chunk_length)]
  after = [jax.tree.map(lambda w, i=i: w[i], path) for i in ends]
  return list(zip([initial, *after[:-1]], after, strict=True))


def inner(loss, outputs, targets):
  """Mean of the losses of tokens, and their gradients' norms."""
  values, errors = jax.vmap(jax.value_and_grad(loss))(outputs, targets)
  return np.mean(values), np.linalg.norm(errors, axis=-1)


def squared(tree):
  return sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(tree))


def change(initial, final):
  """|D| / |M_0| of matrices together."""
  difference = jax.tree.map(jnp.subtract, final, initial)
  return (squared(difference) / squared(initial)) ** 0.5


def half_lives(retention):
  with np.errstate(divide="ignore"):
    return np.log(0.5) / np.log(np.asarray(retention))


def check(found, wanted):
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def token_loss(cfg):
  def loss(output, target):
    if cfg.setting == "chunk_dot":
      return -2 * cfg.loss_factor * output @ target
    return cfg.loss_factor * jnp.sum((output - target) ** 2)

  return loss


def log_of_chunks(cfg, rates, half, losses):
  """Means over chunks of what is a mean or a median within one.

  losses: per chunk, over batch and heads: (before, norms of errors, after).
  """
  bound = cfg.error_clip or np.inf
  return {
    "learn_rate": np.mean([np.mean(x) for x in rates]),
    "half_life": np.mean([np.median(x) for x in half]),
    "loss_before": np.mean([np.mean([x[0] for x in c]) for c in losses]),
    "loss_after": np.mean([np.mean([x[2] for x in c]) for c in losses]),
    "clip_rate": np.mean([np.mean([x[1] > bound for x in c]) for c in losses]),
  }


@pytest.mark.parametrize(
  "options",
  [
    {"error_clip": 4.0, "chunk_length": 7},  # whole chunks
    {"setting": "chunk_dot", "delta_rule": "none", "error_clip": 2.0},
    {"architecture": "matrix", "retention": "zero", "target": "shared"},
  ],
  ids=str,
)
def test_dynamics_of_a_memory_are_those_of_its_token_loop(options):
  cfg = MemoryConfig(**{"chunk_length": CHUNK_LENGTH, **options})
  cfg = dataclasses.replace(cfg, loss_factor=0.7)
  initial, sequence, gates = test_deep.random_memory(
    architecture=cfg.architecture
  )
  run = lambda initial, tokens: (
    deep.run_memory(initial, tokens, cfg, with_dynamics=True).dynamics
  )
  found = fast_jit(run)(initial, deep.Tokens(*sequence, gates))
  heads = jax.vmap(lambda w, s, g: oracle.run_memory(w, *s, g, cfg)[2])
  paths = fast_jit(jax.vmap(heads, (None, 0, 0)))(
    test_deep.by_name(initial), sequence, tuple(gates)
  )
  parts = chunks_of(T, cfg.chunk_length)
  losses, changes = [[] for _ in parts], []
  for b, h in np.ndindex(test_deep.B, test_deep.H):
    start = jax.tree.map(lambda w: w[h], test_deep.by_name(initial))  # noqa: B023
    path = jax.tree.map(lambda w: w[b, h], paths)  # noqa: B023
    states = at_borders(start, path, T, cfg.chunk_length)
    changes.append(change(start, states[-1][1]))
    for i, (before, after) in enumerate(states):
      k, v = (x[b, h, parts[i]] for x in sequence[:2])
      answer = lambda weights, x: jax.vmap(lambda x: oracle.mlp(weights, x))(x)
      targets = answer(before, v) if cfg.target == "self" else v
      first, norms = inner(token_loss(cfg), answer(before, k), targets)
      last, _ = inner(token_loss(cfg), answer(after, k), targets)
      losses[i].append((first, norms, last))
  cut = lambda x: [np.asarray(x[:, :, part]) for part in parts]
  half = [half_lives(x) for x in cut(gates.retention)]
  wanted = log_of_chunks(cfg, cut(gates.learn_rate), half, losses)
  check(found, wanted | {"relative_change": np.median(changes)})
  assert 0.05 < wanted["clip_rate"] < 0.95 or not options.get("error_clip")


def test_dynamics_of_adaptive_projections_are_those_of_their_token_loop():
  cfg = MemoryConfig(
    projection_chunk_length=CHUNK_LENGTH,
    adaptive=("k", "v", "eta", "alpha"),
    error_clip=1.5,
  )
  initial, slow = test_self_modifying.random_boxes(cfg)
  run = lambda *a: self_modifying.run_projections(*a, cfg, with_dynamics=True)
  made, _, found = fast_jit(run)(initial, slow)
  named = oracle.box_weights(initial, cfg)
  heads = jax.vmap(lambda weights, at: oracle.run_boxes(weights, at, cfg)[2])
  paths = fast_jit(jax.vmap(heads, (None, 0)))(named, slow._asdict())
  parts = chunks_of(T, CHUNK_LENGTH)
  cut = lambda x: [np.asarray(x[:, :, part]) for part in parts]
  rates = cut(made.gates.learn_rate)
  half = [half_lives(x) for x in cut(made.gates.retention)]
  for kind, boxes in (("projection", "k v"), ("gate", "eta alpha")):
    losses, outputs, hidden = [[] for _ in parts], [], []
    for b, h in np.ndindex(test_deep.B, test_deep.H):
      start = jax.tree.map(lambda w: w[h], named)  # noqa: B023
      path = jax.tree.map(lambda w: w[b, h], paths)  # noqa: B023
      states = at_borders(start, path, T, CHUNK_LENGTH)
      layer = lambda name, at: {box: at[box][name] for box in at}
      final = states[-1][1]
      hidden.append(change(layer("hidden", start), layer("hidden", final)))
      for box in boxes.split():
        outputs.append(change(start[box]["output"], final[box]["output"]))
        for i, (before, after) in enumerate(states):
          k, v = (x[b, h, parts[i]] for x in (made.k, made.v))
          answer = lambda weights, x: jax.vmap(
            lambda x: oracle.mlp(weights, x, kind == "projection")  # noqa: B023
          )(x)
          targets = answer(before[box], v)
          first, norms = inner(token_loss(cfg), answer(before[box], k), targets)
          last, _ = inner(token_loss(cfg), answer(after[box], k), targets)
          losses[i].append((first, norms, last))
    wanted = log_of_chunks(cfg, rates, half, losses)
    changed = (np.median(hidden) + np.median(outputs)) / 2
    check(found[kind], wanted | {"relative_change": changed})
    assert 0.05 < wanted["clip_rate"] < 0.95


@pytest.mark.parametrize("chunk_length", [11, 4])
def test_dynamics_of_a_level_are_those_of_its_token_loop(chunk_length):
  slow, n, value = test_cms.random_level()
  keys = test_cms.random_level(1)[1]
  run = lambda *a: test_cms.run(
    *a, keys=keys, chunk_length=chunk_length, with_dynamics=True
  )
  found = fast_jit(run)(slow, n, value)[2]
  parts = chunks_of(test_cms.T, chunk_length)
  losses, changes = [[] for _ in parts], []
  level = fast_jit(
    lambda n, value, keys: oracle.run_cms_level(
      slow, n, value, 0.3, chunk_length, 1.0, keys=keys
    )[2]
  )
  for b in range(test_cms.B):
    path = cms.LevelWeights(*level(n[b], value[b], keys[b]))
    path = jax.tree.map(lambda fast, w: w[None] + fast, path, slow)
    states = at_borders(slow, path, test_cms.T, chunk_length)
    changes.append(change(slow, states[-1][1]))
    for i, (before, after) in enumerate(states):
      answer = lambda weights: oracle.feed_forward(weights, keys[b, parts[i]])  # noqa: B023
      loss = lambda y, value: 0.5 * jnp.sum((y - value) ** 2)
      targets = value[b, parts[i]]
      first, norms = inner(loss, answer(before), targets)
      losses[i].append((first, norms, inner(loss, answer(after), targets)[0]))
  cfg = MemoryConfig(error_clip=1.0)
  wanted = log_of_chunks(cfg, [0.3], [np.nan], losses)
  del wanted["half_life"]
  check(found, wanted | {"relative_change": np.median(changes)})
