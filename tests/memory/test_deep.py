"""The deep memory against token loops, and what it must do."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hope_jax.config import MemoryConfig
from hope_jax.memory import chunks, deep, rules
from hope_jax.memory.architectures import Weights
from hope_jax.memory.rules import Gates
from tests.support import oracle
from tests.support.jit import fast_jit
from tests.support.tiers import slow_case

B, H, T, K, F = 2, 2, 21, 4, 6

# Equations 86-88 as printed: the rule on the whole matrix, sums, eta' = eta.
LITERAL = MemoryConfig(
  adaptive=("k", "v", "eta", "alpha"),
  retention="zero",
  momentum="sum",
  delta_rule="literal",
  proximal=False,
  step_scale="sum",
  loss_factor=1.0,
  error_clip=0.0,
  read="token_pre",
  chunk_length=1,
  projection_chunk_length=1,
)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def random_memory(seed=0, length=T, architecture="mlp"):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  is_mlp = architecture == "mlp"
  initial = Weights(
    normal(H, F, K) / 2 if is_mlp else None,
    normal(H, K, F if is_mlp else K) / 3,
  )
  sequence = (
    unit(normal(B, H, length, K)),
    normal(B, H, length, K),
    unit(normal(B, H, length, K)),
  )
  gate = lambda low, high: jnp.asarray(
    rng.uniform(low, high, size=(B, H, length))
  )
  retention = gate(0.6, 1.0)
  retention = retention.at[:, :, length // 2].set(0.0)  # an exact zero
  return initial, sequence, Gates(gate(0.05, 0.9), retention, gate(0.3, 0.9))


def by_name(weights):
  named = {"output": weights.output}
  if weights.hidden is not None:
    named["hidden"] = weights.hidden
  return named


def loop(initial, sequence, gates, cfg):
  """The oracle over batch and heads: outputs [B, H, T, K]."""
  one = lambda weights, sequence, gates: oracle.run_memory(
    weights, *sequence, gates, cfg
  )[0]
  heads = jax.vmap(one)
  batch = jax.vmap(heads, in_axes=(None, 0, 0))
  return batch(by_name(initial), sequence, tuple(gates))


def run_memory(initial, sequence, gates, cfg, **kwargs):
  if cfg.momentum == "none":
    gates = gates._replace(momentum_decay=None)
  return deep.run_memory(initial, deep.Tokens(*sequence, gates), cfg, **kwargs)


def chunked(initial, sequence, gates, cfg, **kwargs):
  return run_memory(initial, sequence, gates, cfg, **kwargs).outputs


def compiled(function, *arguments, cfg, **kwargs):
  return fast_jit(lambda *a: function(*a, cfg, **kwargs))(*arguments)


OPTIONS = [
  {"read": "token_post"},
  {"read": "chunk", "target": "shared"},
  {"setting": "token_exact"},
  {"setting": "token_exact", "target_clip": 1.0},
  {"setting": "token_exact", "momentum": "none", "architecture": "matrix"},
  {"delta_rule": "none", "target": "shared"},
  {"delta_rule": "literal", "momentum": "sum", "retention": "none"},
  {"retention": "zero", "step_scale": "sum", "loss_factor": 1.0},
  {"retention": "zero", "setting": "token_exact", "read": "token_post"},
  {"setting": "chunk_dot", "delta_rule": "none", "momentum": "none"},
  {"setting": "negative_eigenvalues"},
  {"setting": "negative_eigenvalues", "architecture": "matrix"},
  {"architecture": "matrix", "error_clip": 0.0, "proximal": False},
]


@pytest.mark.parametrize(
  ("options", "chunk_length"),
  [({}, 1), ({}, 3), ({}, 16), ({}, 64)]
  + [(options, 3 if i % 2 else 16) for i, options in enumerate(OPTIONS)],
  ids=str,
)
def test_memory_equals_token_loop(options, chunk_length):
  cfg = MemoryConfig(chunk_length=chunk_length, **options)
  case = random_memory(architecture=cfg.architecture)
  np.testing.assert_allclose(
    compiled(chunked, *case, cfg=cfg),
    compiled(loop, *case, cfg=cfg),
    atol=1e-10,
    rtol=1e-10,
  )


def test_errors_of_the_hidden_layer_are_clipped():
  """Where M_0 is large enough that they exceed the bound, too."""
  cfg = MemoryConfig(chunk_length=3, error_clip=0.2)
  initial, sequence, gates = random_memory()
  initial = initial._replace(output=4 * initial.output)
  weights = {name: w[0] for name, w in by_name(initial).items()}
  key, target = sequence[0][0, 0, 0], sequence[1][0, 0, 0]
  free = dataclasses.replace(cfg, error_clip=0.0)
  errors = oracle.errors(weights, weights, key, target, free, residual=True)
  clipped = oracle.clip(errors["output"], cfg.error_clip)
  ratio = jnp.linalg.norm(clipped) / jnp.linalg.norm(errors["output"])
  assert jnp.linalg.norm(errors["hidden"]) * ratio > 1.5 * cfg.error_clip
  np.testing.assert_allclose(
    compiled(chunked, initial, sequence, gates, cfg=cfg),
    compiled(loop, initial, sequence, gates, cfg=cfg),
    atol=1e-10,
  )


@pytest.mark.parametrize(
  ("options", "chunk_length"),
  [
    ({"setting": "token_exact"}, 16),
    ({"read": "chunk", "momentum": "none"}, 12),
    ({"read": "token_post"}, 7),  # a prime: one subchunk
  ],
)
def test_memory_in_subchunks_equals_token_loop(
  options, chunk_length, monkeypatch
):
  monkeypatch.setattr(rules, "SUBCHUNK_LENGTH", 4)
  cfg = MemoryConfig(chunk_length=chunk_length, **options)
  case = random_memory()
  ours = compiled(chunked, *case, cfg=cfg)
  np.testing.assert_allclose(
    ours, compiled(loop, *case, cfg=cfg), atol=1e-10, rtol=1e-10
  )


# Every field of the rule, with all of its values.
RULE = {
  "architecture": ["mlp", "matrix"],
  "target": ["self", "shared"],
  "setting": ["chunk_l2", "chunk_dot", "token_exact", "negative_eigenvalues"],
  "delta_rule": ["proximal", "literal", "none"],
  "momentum": ["averaged", "sum", "none"],
  "retention": ["start", "zero", "none"],
  "step_scale": ["mean", "sum"],
  "proximal": [True, False],
  "loss_factor": [0.5, 1.0],
  "error_clip": [1.0, 0.0],
  "target_clip": [1.0, 0.0],
  "read": ["token_pre", "token_post", "chunk"],
  "chunk_length": [1, 2, 5, 8, 16, 64],
}


def check_any_rule(options):
  """Any combination equals its token loop; large steps may blow both up."""
  if options["setting"] == "negative_eigenvalues":
    assume(options["read"] != "chunk" and options["delta_rule"] != "none")
  cfg = MemoryConfig(**options)
  initial, sequence, gates = random_memory(architecture=cfg.architecture)
  gates = gates._replace(learn_rate=gates.learn_rate / 4)
  expected = compiled(loop, initial, sequence, gates, cfg=cfg)
  ours = compiled(chunked, initial, sequence, gates, cfg=cfg)
  scale = max(1.0, jnp.abs(expected).max())
  np.testing.assert_allclose(ours / scale, expected / scale, atol=1e-10)


@settings(max_examples=8)
@given(st.fixed_dictionaries({k: st.sampled_from(v) for k, v in RULE.items()}))
def test_any_rule_equals_its_token_loop(options):
  check_any_rule(options)


@pytest.mark.slow
@settings(max_examples=400)
@given(st.fixed_dictionaries({k: st.sampled_from(v) for k, v in RULE.items()}))
def test_many_rules_equal_their_token_loops(options):
  check_any_rule(options)
  jax.clear_caches()


@pytest.mark.parametrize(
  ("setting", "is_exact"),
  [("negative_eigenvalues", True), ("token_exact", False)],
)
def test_memory_tracks_parity(setting, is_exact):
  """One head, keys all k, values 0: a step of 2 turns M k around, 0 keeps it,
  so that its sign is the parity of the bits.  No proximal step can."""
  bits = np.random.default_rng(0).integers(2, size=4096)
  cfg = MemoryConfig(
    architecture="matrix",
    setting=setting,
    target="shared",
    momentum="none",
    retention="none",
    read="token_post",
  )
  with jax.enable_x64(False):
    key = jnp.array([0.6, 0.8])
    keys = jnp.broadcast_to(key, (1, 1, 4096, 2))
    learn_rate = 2.0 * jnp.asarray(bits, jnp.float32)[None, None]
    out = deep.run_memory(
      Weights(None, jnp.outer(jnp.array([1.0, 0.0]), key)[None]),
      deep.Tokens(
        keys,
        jnp.zeros_like(keys),
        keys,
        Gates(learn_rate, jnp.ones_like(learn_rate), None),
      ),
      cfg,
    )
  parity = 1 - 2 * (np.cumsum(bits) % 2)
  error = np.abs(np.asarray(out.outputs[0, 0, :, 0]) - parity).max()
  assert error < 1e-3 if is_exact else error > 0.5


def test_memory_literal_equals_written_out_equations():
  """Eq. 86-88 by hand: no shared code with the oracle's rule."""
  initial, sequence, gates = random_memory(length=9)
  ours = compiled(chunked, initial, sequence, gates, cfg=LITERAL)
  for b, h in itertools.product(range(B), range(H)):
    w1, w2 = initial.output[h], initial.hidden[h]
    s1, s2 = jnp.zeros_like(w1), jnp.zeros_like(w2)
    memory = lambda w1, w2, x: x + w1 @ jax.nn.silu(w2 @ x)
    for t in range(9):
      k, v, q = (x[b, h, t] for x in sequence)
      eta, alpha, beta = (g[b, h, t] for g in gates)
      o = memory(w1, w2, q)  # (86)
      np.testing.assert_allclose(ours[b, h, t], o, atol=1e-10)
      target = memory(w1, w2, v)  # (87)

      def loss(w1, w2, k=k, target=target, memory=memory):
        return jnp.sum((memory(w1, w2, k) - target) ** 2)

      g1, g2 = jax.grad(loss, (0, 1))(w1, w2)
      hidden = jax.nn.silu(w2 @ k)
      s1, s2 = beta * s1 - eta * g1, beta * s2 - eta * g2
      w1 = (
        w1 @ (alpha * jnp.eye(F) - eta * jnp.outer(hidden, hidden)) + s1
      )  # (88)
      w2 = w2 @ (alpha * jnp.eye(K) - eta * jnp.outer(k, k)) + s2


def test_memory_outer_gradients_equal_token_loop():
  cfg = MemoryConfig(chunk_length=4)
  initial, sequence, gates = random_memory(length=10)

  def gradient(run, *arguments, cfg):
    total = lambda *a: jnp.sum(jnp.sin(run(*a, cfg)))
    return fast_jit(jax.grad(total, (0, 1, 2)))(*arguments)

  ours = gradient(chunked, initial, sequence, gates, cfg=cfg)
  loops = gradient(loop, initial, sequence, gates, cfg=cfg)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(loops), strict=True):
    assert jnp.linalg.norm(b) > 0
    np.testing.assert_allclose(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("remat", [slow_case("chunk"), "sqrt"])
def test_memory_remat_keeps_gradients(remat):
  case = random_memory(length=200)

  def gradient(policy):
    cfg = MemoryConfig(chunk_length=2, remat=policy)
    loss = lambda initial: jnp.sum(chunked(initial, *case[1:], cfg) ** 2)
    return fast_jit(jax.grad(loss))(case[0])

  for a, b in zip(gradient(remat), gradient("none"), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9)


def test_memory_is_causal():
  initial, sequence, gates = random_memory()
  cfg = MemoryConfig(chunk_length=4, read="token_post")
  before = compiled(chunked, initial, sequence, gates, cfg=cfg)
  changed = tuple(x.at[:, :, 13].add(1.0) for x in sequence)
  after = compiled(chunked, initial, changed, gates, cfg=cfg)
  np.testing.assert_array_equal(before[:, :, :13], after[:, :, :13])
  assert jnp.abs(before - after)[:, :, 13:].max() > 1e-6


def test_memory_without_writes_is_the_slow_model():
  initial, sequence, gates = random_memory()
  for retention, setting in (
    ("start", "chunk_l2"),
    ("start", "token_exact"),
    ("none", "chunk_l2"),
  ):
    cfg = MemoryConfig(chunk_length=4, retention=retention, setting=setting)
    off = gates._replace(learn_rate=jnp.zeros_like(gates.learn_rate))
    live = jax.jit(chunked, static_argnums=3)(initial, sequence, off, cfg)
    slow = jax.jit(lambda *a, cfg=cfg: chunked(*a, cfg, writes=False))(
      initial, sequence, gates
    )
    np.testing.assert_array_equal(live, slow)


def test_state_for_pieces_that_end_inside_a_chunk_knows_its_place():
  """Also where they are longer than a chunk; only whole chunks need none."""
  now = chunks.zero_state(
    random_memory()[0], B, has_momentum=MemoryConfig().momentum != "none"
  )
  for piece, is_known in ((8, False), (6, True), (2, True), (None, True)):
    state = chunks.fresh(now, 4, piece)
    assert (state.position is not None) == is_known


def test_memory_without_writes_keeps_its_state():
  cfg = MemoryConfig(chunk_length=4)
  initial, sequence, gates = random_memory(length=3)
  state = chunks.fresh(
    chunks.zero_state(initial, B, has_momentum=cfg.momentum != "none")
  )
  out = run_memory(initial, sequence, gates, cfg, state=state, writes=False)
  assert out.state is state


@pytest.mark.parametrize("retention", ["start", "zero"])
@pytest.mark.parametrize("pieces", [(1,) * 21, (5, 1, 7, 1, 7)])
def test_memory_in_pieces_equals_one_pass(retention, pieces):
  cfg = MemoryConfig(chunk_length=4, retention=retention)
  initial, sequence, gates = random_memory()
  whole = compiled(chunked, initial, sequence, gates, cfg=cfg)
  state = chunks.fresh(
    chunks.zero_state(initial, B, has_momentum=cfg.momentum != "none")
  )
  step = fast_jit(
    lambda initial, sequence, gates, state: run_memory(
      initial, sequence, gates, cfg, state=state
    )
  )
  outputs, first = [], 0
  for size in pieces:
    part = slice(first, first + size)
    out = step(
      initial,
      tuple(x[:, :, part] for x in sequence),
      Gates(*(g[:, :, part] for g in gates)),
      state,
    )
    outputs.append(out.outputs)
    state, first = out.state, first + size
  np.testing.assert_allclose(
    jnp.concatenate(outputs, axis=2), whole, atol=1e-10
  )


@pytest.mark.parametrize("retention", ["start", "zero"])
def test_memory_forgets_at_document_borders(retention):
  cfg = MemoryConfig(chunk_length=4, read="token_post", retention=retention)
  initial, sequence, gates = random_memory(length=20)
  documents = jnp.repeat(jnp.array([0, 1]), jnp.array([8, 12]))[None]
  packed = compiled(
    chunked,
    initial,
    sequence,
    gates,
    cfg=cfg,
    documents=jnp.repeat(documents, B, 0),
  )
  part = lambda first, last: compiled(
    chunked,
    initial,
    tuple(x[:, :, first:last] for x in sequence),
    Gates(*(g[:, :, first:last] for g in gates)),
    cfg=cfg,
  )
  apart = jnp.concatenate([part(0, 8), part(8, 20)], axis=2)
  np.testing.assert_allclose(packed, apart, atol=1e-12)


def test_memory_forgets_wherever_the_number_of_a_document_changes():
  """Also where it falls: numbers tell documents apart, they do not count."""
  initial, sequence, gates = random_memory(length=12)
  packed = lambda *numbers: compiled(
    chunked,
    initial,
    sequence,
    gates,
    cfg=MemoryConfig(chunk_length=4),
    documents=jnp.repeat(jnp.array(numbers), 4)[None].repeat(B, 0),
  )
  np.testing.assert_array_equal(packed(0, 2, 1), packed(0, 1, 2))


def test_memory_recalls_what_it_was_told():
  """Setting A: after one write of k -> v, M(k) is v up to the step size."""
  initial, sequence, _ = random_memory(length=2)
  keys = jnp.repeat(sequence[0][:, :, :1], 2, axis=2)
  cfg = MemoryConfig(
    setting="token_exact",
    target="shared",
    architecture="matrix",
    momentum="none",
    chunk_length=2,
    read="token_pre",
  )
  initial = Weights(None, initial.output[:, :, :K])
  gates = Gates(jnp.full((B, H, 2), 99.0), jnp.ones((B, H, 2)), None)
  out = compiled(chunked, initial, (keys, sequence[1], keys), gates, cfg=cfg)
  first = sequence[1][:, :, 0]
  np.testing.assert_allclose(out[:, :, 1], first, atol=0.03)


@pytest.mark.parametrize(
  ("target_clip", "is_bounded"), [(4.0, True), (0, False)]
)
def test_exact_memory_with_its_own_targets_stays_bounded(
  target_clip, is_bounded
):
  """vhat = M(v) holds D h(v): where h(v) is larger than h(k), D would grow by
  their ratio from chunk to chunk."""
  cfg = MemoryConfig(
    setting="token_exact", target_clip=target_clip, chunk_length=8
  )
  initial, (keys, values, queries), _ = random_memory(length=256)
  gates = Gates(*(jnp.full((B, H, 256), g) for g in (4.0, 0.999, 0.88)))
  state = chunks.fresh(
    chunks.zero_state(initial, B, has_momentum=cfg.momentum != "none")
  )
  out = run_memory(
    initial, (keys, 8 * values, queries), gates, cfg, state=state
  )
  assert out.state is not None
  largest = max(jnp.abs(w).max() for w in jax.tree.leaves(out.state.now))
  assert largest < 20 if is_bounded else not largest < 1e4


def test_memory_changes_by_a_percent_in_4k_tokens():
  with jax.enable_x64(False):
    cfg = dataclasses.replace(MemoryConfig(), chunk_length=64)
    initial, sequence, _ = jax.tree.map(
      lambda x: x.astype(jnp.float32), random_memory(length=4096)
    )
    gates = Gates(*(jnp.full((B, H, 4096), g) for g in (0.7, 0.9999, 0.88)))
    out = deep.run_memory(
      initial, deep.Tokens(*sequence, gates), cfg, with_dynamics=True
    )
    assert out.dynamics["relative_change"] > 0.01
    assert jnp.isfinite(out.outputs).all()
