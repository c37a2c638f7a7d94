"""Continuum memory: a loop of `jax.grad` steps, periods, twins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.memory import chunks, cms
from tests.support import oracle
from tests.support.jit import fast_jit
from tests.support.tiers import slow_case

B, T, D, F, C = 2, 22, 5, 7, 4
RULE = {
  "learn_rate": 0.3,
  "log_retention": None,
  "chunk_length": C,
  "error_clip": 1.0,
}


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def random_level(seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
  slow = cms.LevelWeights(normal(D, F), normal(D, F), normal(F, D) / 3)
  return slow, normal(B, T, D), normal(B, T, D)


def run(slow, n, value, state=None, **kwargs):
  fields = {name: kwargs.pop(name) for name in RULE if name in kwargs}
  rule = cms.Rule(**{**RULE, **fields})
  return cms.run_level(
    slow, n, value, rule, policy="sqrt", state=state, **kwargs
  )


@pytest.mark.parametrize(
  ("error_clip", "alpha", "has_keys"),
  [
    (1.0, 0.9, True),
    (0.0, 1.0, False),
    *(
      slow_case(1.0, *rest)
      for rest in ((1.0, True), (1.0, False), (0.9, False))
    ),
    *(
      slow_case(0.0, *rest) for rest in ((1.0, True), (0.9, True), (0.9, False))
    ),
  ],
)
def test_level_equals_loop_of_gradient_steps(error_clip, alpha, has_keys):
  slow, n, value = random_level()
  keys = random_level(1)[1] if has_keys else n
  ours, _, _ = run(
    slow,
    n,
    value,
    error_clip=error_clip,
    log_retention=None if alpha == 1 else jnp.log(alpha),
    keys=keys if has_keys else None,
  )
  for b in range(B):
    expected, *_ = oracle.run_cms_level(
      slow, n[b], value[b], 0.3, C, error_clip, alpha=alpha, keys=keys[b]
    )
    np.testing.assert_allclose(ours[b], expected, atol=1e-12)


def test_unclipped_write_is_the_gradient_of_the_loss():
  """One chunk of equal inputs: D is -rate * grad of 1/2 |y - value|^2."""
  slow, n, value = random_level()
  n, value = n[:, :1], value[:, :1]
  state = chunks.fresh(cms.zero_state(slow, B))
  _, state, _ = run(slow, n, value, error_clip=0.0, chunk_length=1, state=state)
  y = lambda weights: oracle.feed_forward(weights, n[0, 0])
  loss = lambda weights: 0.5 * jnp.sum((y(weights) - value[0, 0]) ** 2)
  gradient = jax.grad(loss)(slow)
  square = n[0, 0] @ n[0, 0]
  np.testing.assert_allclose(
    state.now.weight.up[0], -0.3 / (1 + 0.3 * square) * gradient.up
  )


def test_level_changes_only_at_its_period():
  slow, n, value = random_level()
  step = fast_jit(run)
  state = chunks.fresh(cms.zero_state(slow, B))
  for t in range(T):
    before = state.start.up
    _, state, _ = step(slow, n[:, t : t + 1], value[:, t : t + 1], state)
    changed = bool(jnp.any(before != state.start.up))
    assert changed == ((t + 1) % C == 0)


@pytest.mark.parametrize("log_retention", [None, -0.1])
@pytest.mark.parametrize("pieces", [(1,) * T, (3, 1, 9, 1, 8)])
def test_level_in_pieces_equals_one_pass(pieces, log_retention):
  slow, n, value = random_level()
  whole, _, _ = run(slow, n, value, log_retention=log_retention)
  step = fast_jit(functools.partial(run, log_retention=log_retention))
  state, outputs, first = chunks.fresh(cms.zero_state(slow, B)), [], 0
  for size in pieces:
    part = slice(first, first + size)
    y, state, _ = step(slow, n[:, part], value[:, part], state)
    outputs.append(y)
    first += size
  np.testing.assert_allclose(
    jnp.concatenate(outputs, axis=1), whole, atol=1e-12
  )


def test_level_without_rate_is_the_slow_block():
  slow, n, value = random_level()
  live, _, _ = run(slow, n, value, learn_rate=0.0)
  np.testing.assert_allclose(live, cms.feed_forward(slow, n), atol=1e-14)


def test_level_is_causal_and_reads_whole_chunks():
  slow, n, value = random_level()
  before, _, _ = run(slow, n, value)
  after, _, _ = run(slow, n, value.at[:, 5].add(1.0))
  np.testing.assert_array_equal(before[:, :8], after[:, :8])
  assert jnp.abs(before - after)[:, 8:].max() > 1e-6


def test_level_starts_anew_with_a_document():
  slow, n, value = random_level()
  documents = (jnp.arange(T) >= 8).astype(jnp.int32)[None].repeat(B, 0)
  packed, _, _ = run(slow, n, value, documents=documents)
  apart, _, _ = run(slow, n[:, 8:], value[:, 8:])
  np.testing.assert_allclose(packed[:, 8:], apart, atol=1e-12)


def test_document_may_begin_inside_a_chunk():
  """Its tokens read W_0 until the chunk ends; the old document's are gone."""
  slow, n, value = random_level()
  documents = (jnp.arange(T) >= 10).astype(jnp.int32)[None].repeat(B, 0)
  packed, _, _ = run(slow, n, value, documents=documents)
  before, _, _ = run(slow, n[:, :10], value[:, :10])
  # As if the chunk's first two places had been empty.
  alone = [jnp.pad(x[:, 10:], ((0, 0), (2, 0), (0, 0))) for x in (n, value)]
  after = run(slow, *alone)[0][:, 2:]
  np.testing.assert_allclose(packed[:, :10], before, atol=1e-12)
  np.testing.assert_allclose(packed[:, 10:], after, atol=1e-12)


@pytest.mark.parametrize(
  "size", [1, 3, slow_case(4), slow_case(5), 11, slow_case(21)]
)
def test_documents_in_pieces_equal_one_pass(size):
  """Pieces number their documents anew: 0 goes on with the state's."""
  slow, n, value = random_level()
  number = jnp.repeat(jnp.arange(4), jnp.array([3, 7, 2, 10]))
  whole, _, _ = run(slow, n, value, documents=number[None].repeat(B, 0))
  state, outputs = chunks.fresh(cms.zero_state(slow, B)), []
  step = fast_jit(
    lambda n, value, state, documents: run(
      slow, n, value, state, documents=documents
    )
  )
  for first in range(0, T, size):
    piece = slice(first, first + size)
    last = number[max(first - 1, 0)]
    documents = (number[piece] - last)[None].repeat(B, 0)
    y, state, _ = step(n[:, piece], value[:, piece], state, documents)
    outputs.append(y)
  np.testing.assert_allclose(jnp.concatenate(outputs, 1), whole, atol=1e-12)


def test_outer_gradient_goes_through_the_writes():
  slow, n, value = random_level()
  loss = lambda value, rate: jnp.sum(
    run(slow, n, value, learn_rate=rate)[0] ** 2
  )
  to_value, to_rate = jax.grad(loss, (0, 1))(value, 0.3)
  assert jnp.abs(to_value[:, : T - C]).max() > 0 and to_rate != 0


LENGTHS, RATES, ALPHAS = (2, 4, 12), (0.3, 0.2, 0.4), (0.9, 1.0, 0.97)
EPSILON = 0.01


def nested_levels(frozen=()):
  scales = random_level(3)[1][0, : len(LENGTHS)]
  return [
    cms.NestedLevel(
      scale,
      cms.Rule(rate, None if alpha == 1 else jnp.log(alpha), length, 1.0),
      i not in frozen,
      EPSILON,
    )
    for i, (scale, rate, alpha, length) in enumerate(
      zip(scales, RATES, ALPHAS, LENGTHS, strict=True)
    )
  ]


def run_nested(slow, x, value, state=None, frozen=(), **kwargs):
  levels = nested_levels(frozen)
  return cms.run_nested(
    slow, x, value, levels, policy="sqrt", state=state, **kwargs
  )


def fresh_nested(slow):
  return [chunks.fresh(cms.zero_state(slow, B)) for _ in LENGTHS]


@pytest.mark.parametrize("frozen", [(), (1,)])
def test_nested_levels_equal_their_token_loop(frozen):
  slow, x, value = random_level()
  ours, states, _ = run_nested(slow, x, value, fresh_nested(slow), frozen)
  fields = ("learn_rate", "alpha", "chunk")
  rules = [
    {**dict(zip(fields, values, strict=True)), "error_clip": 1.0}
    for values in zip(RATES, ALPHAS, LENGTHS, strict=True)
  ]
  scales = [level.scale for level in nested_levels()]
  expected, after = oracle.run_cms_nested(
    slow, x[1], value[1], scales, rules, frozen, epsilon=EPSILON
  )
  np.testing.assert_allclose(ours[1], expected, atol=1e-12)
  for i, (state, (_, now)) in enumerate(zip(states, after, strict=True)):
    assert state.position == T % LENGTHS[i]
    now = jax.tree.map(jnp.zeros_like, now) if i in frozen else now
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-12),
      tuple(state.now.weight),
      now,
    )
  alone, _, _ = run_nested(slow, x, value, frozen=frozen)
  np.testing.assert_allclose(alone, ours, atol=1e-12)


@pytest.mark.parametrize("pieces", [(1,) * T, (3, 1, 9, 1, 8), (12, 10)])
def test_nested_levels_in_pieces_equal_one_pass(pieces):
  slow, x, value = random_level()
  whole, end, _ = run_nested(slow, x, value, fresh_nested(slow))
  step = fast_jit(run_nested)
  state, outputs, first = fresh_nested(slow), [], 0
  for size in pieces:
    part = slice(first, first + size)
    y, state, _ = step(slow, x[:, part], value[:, part], state)
    outputs.append(y)
    first += size
  np.testing.assert_allclose(jnp.concatenate(outputs, 1), whole, atol=1e-12)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), state, end
  )


@pytest.mark.parametrize("border", [12, 10, 17])
def test_nested_levels_start_anew_with_a_document(border):
  """Inside a chunk, too: see `test_document_may_begin_inside_a_chunk`.  At 17
  it begins inside one of every level, the slowest having learned before."""
  slow, x, value = random_level()
  documents = (jnp.arange(T) >= border).astype(jnp.int32)[None].repeat(B, 0)
  packed, _, _ = run_nested(slow, x, value, documents=documents)
  before, _, _ = run_nested(slow, x[:, :border], value[:, :border])
  np.testing.assert_allclose(packed[:, :border], before, atol=1e-12)
  other = x.at[:, : border - 1].add(1.0)
  again, _, _ = run_nested(slow, other, value, documents=documents)
  np.testing.assert_array_equal(packed[:, border:], again[:, border:])
  if border == LENGTHS[-1]:
    apart, _, _ = run_nested(slow, x[:, border:], value[:, border:])
    np.testing.assert_allclose(packed[:, border:], apart, atol=1e-12)
