"""Adaptive projections against the token loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.config import MemoryConfig
from hope_jax.memory import chunks, rules, self_modifying
from hope_jax.memory.self_modifying import Boxes, Slow
from tests.memory.test_deep import LITERAL
from tests.support import oracle
from tests.support.jit import fast_jit

B, H, T, K, F = 2, 2, 21, 4, 6


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def random_boxes(cfg, seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape)) / 2
  projections = self_modifying.members(cfg, self_modifying.PROJECTIONS)
  gates = self_modifying.members(cfg, self_modifying.GATES)
  is_matrix = cfg.architecture == "matrix"
  width = K if is_matrix else F
  count = len(projections + gates)
  initial = Boxes(
    None if is_matrix else normal(H, count * F, K),
    normal(H, len(projections), K, width) if projections else None,
    normal(H, len(gates), 1, width) if gates else None,
  )
  slow = Slow(
    *(2 * normal(B, H, T, K) for _ in range(3)),
    normal(B, H, T),
    normal(B, H, T) - 1,
    None if cfg.momentum == "none" else jax.nn.sigmoid(normal(B, H, T)),
  )
  return initial, slow


def project(initial, slow, cfg, **kwargs):
  made, _, _ = self_modifying.run_projections(initial, slow, cfg, **kwargs)
  return [made.k, made.v, made.q, made.gates.learn_rate, made.gates.retention]


def run(initial, slow, cfg, **kwargs):
  return fast_jit(lambda *a: project(*a, cfg, **kwargs))(initial, slow)


CASES = [
  {"adaptive": ("k", "v", "q", "eta", "alpha")},
  {"adaptive": ("v",), "momentum": "none"},
  {"adaptive": ("eta", "alpha"), "setting": "token_exact"},
  {"adaptive": ("k", "eta"), "delta_rule": "none", "retention": "none"},
  {"architecture": "matrix", "retention": "zero"},
  dataclasses.asdict(LITERAL),
]


@pytest.mark.parametrize(
  ("options", "chunk_length"),
  [({}, 1), ({}, 3), ({}, 16), ({}, 64)]
  + [(options, 3 if i % 2 else 16) for i, options in enumerate(CASES)],
  ids=lambda o: str(o)[:40],
)
def test_projections_equal_token_loop(options, chunk_length):
  cfg = MemoryConfig(**options | {"projection_chunk_length": chunk_length})
  initial, slow = random_boxes(cfg)
  if not cfg.proximal:  # the literal rule is stable for small steps only
    slow = slow._replace(eta=slow.eta - 4)
  ours = run(initial, slow, cfg)
  sequence = {name: x for name, x in slow._asdict().items() if x is not None}
  sequence.setdefault("beta", jnp.zeros((B, H, T)))
  heads = jax.vmap(lambda weights, at: oracle.run_boxes(weights, at, cfg)[0])
  batch = fast_jit(jax.vmap(heads, in_axes=(None, 0)))
  expected = batch(oracle.box_weights(initial, cfg), sequence)
  for a, e in zip(ours, expected, strict=True):
    np.testing.assert_allclose(a, e, atol=1e-10)


def test_projections_in_subchunks_equal_whole_chunks(monkeypatch):
  cfg = MemoryConfig(projection_chunk_length=16)
  initial, slow = random_boxes(cfg)
  whole = run(initial, slow, cfg)
  monkeypatch.setattr(rules, "SUBCHUNK_LENGTH", 4)
  for a, b in zip(run(initial, slow, cfg), whole, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-12)


def test_projections_outer_gradient_reaches_every_box():
  cfg = MemoryConfig(
    adaptive=("k", "v", "q", "eta", "alpha"), projection_chunk_length=4
  )
  initial, slow = random_boxes(cfg)
  total = lambda initial: sum(
    jnp.sum(jnp.sin(x)) for x in project(initial, slow, cfg)
  )
  gradient = fast_jit(jax.grad(total))(initial)
  assert (jnp.linalg.norm(gradient.hidden, axis=-1) > 0).all()
  assert (jnp.linalg.norm(gradient.projection, axis=(-2, -1)) > 0).all()
  assert (jnp.linalg.norm(gradient.gate, axis=(-2, -1)) > 0).all()


@pytest.mark.parametrize("retention", ["start", "zero"])
def test_frozen_box_stays_and_the_others_learn(retention):
  """Its momentum, too, which would write when it is frozen no longer."""
  cfg = MemoryConfig(projection_chunk_length=4, retention=retention)
  initial, slow = random_boxes(cfg)
  state = chunks.fresh(
    chunks.zero_state(initial, B, has_momentum=cfg.momentum != "none")
  )
  _, state, _ = self_modifying.run_projections(
    initial, slow, cfg, state=state, frozen=("v", "alpha")
  )
  for part, least in (("weight", 1e-3), ("momentum", 1e-8)):
    change = {
      box: max(jnp.abs(x).max() for x in layers.values())
      for box, layers in oracle.box_weights(
        jax.tree.map(lambda w: w[0], getattr(state.now, part)), cfg
      ).items()
    }
    assert max(change["v"], change["alpha"]) < 1e-14
    assert min(change["k"], change["eta"]) > least


@pytest.mark.parametrize("retention", ["start", "zero"])
def test_projections_in_pieces_equal_one_pass(retention):
  cfg = MemoryConfig(projection_chunk_length=4, retention=retention)
  initial, slow = random_boxes(cfg)
  whole = run(initial, slow, cfg)
  state = chunks.fresh(
    chunks.zero_state(initial, B, has_momentum=cfg.momentum != "none")
  )
  step = fast_jit(
    lambda slow, state: self_modifying.run_projections(
      initial, slow, cfg, state=state
    )
  )
  parts, first = [], 0
  for size in (5, 1, 7, 1, 7):
    part = slice(first, first + size)
    piece = Slow(*(x[:, :, part] for x in slow))
    made, state, _ = step(piece, state)
    parts.append(made)
    first += size
  k = jnp.concatenate([part.k for part in parts], axis=2)
  eta = jnp.concatenate([part.gates.learn_rate for part in parts], axis=2)
  np.testing.assert_allclose(k, whole[0], atol=1e-10)
  np.testing.assert_allclose(eta, whole[3], atol=1e-10)


@pytest.mark.parametrize(
  "adaptive", [("k", "v", "eta", "alpha"), ("q", "alpha")]
)
def test_one_box_is_found_among_the_adaptive_ones(adaptive):
  cfg = MemoryConfig(adaptive=adaptive)
  boxes, _ = random_boxes(cfg)
  named = oracle.box_weights(boxes, cfg)
  for box in adaptive:
    output, hidden = self_modifying.only_box(boxes, box, cfg)
    np.testing.assert_array_equal(output, named[box]["output"])
    np.testing.assert_array_equal(hidden, named[box]["hidden"])
    left = self_modifying.without_box(boxes, box, cfg)
    wanted = named | {box: jax.tree.map(jnp.zeros_like, named[box])}
    jax.tree.map(
      np.testing.assert_array_equal, oracle.box_weights(left, cfg), wanted
    )
