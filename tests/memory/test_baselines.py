"""Memora's and TTT's chunk form against their token loops, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.config import MemoryConfig
from hope_jax.memory import chunks, deep, memora, ttt
from hope_jax.memory.architectures import Weights
from hope_jax.memory.rules import Gates
from tests.support import baselines
from tests.support.jit import fast_jit
from tests.support.tiers import slow_case

B, H, T, K, F = 2, 2, 23, 6, 10


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape, float)


def sequence():
  return [normal(seed, B, H, T, K) for seed in (1, 2, 3)]


def over_heads(run, shared, per_token):
  heads = jax.vmap(run, (0, 0))
  return fast_jit(jax.vmap(heads, (None, 0)))(shared, per_token)


def in_pieces(run, state):
  """`run(piece, state)` over pieces that end inside chunks."""
  outputs = []
  for piece in (slice(0, 9), slice(9, 10), slice(10, 17), slice(17, T)):
    out = run(piece, state)
    state, _ = out.state, outputs.append(out.outputs)
  return jnp.concatenate(outputs, axis=2)


@pytest.mark.parametrize(
  ("read", "retention"),
  [
    ("token_pre", "zero"),
    ("token_post", "start"),
    ("chunk", "start"),
    slow_case("token_pre", "start"),
    slow_case("token_post", "zero"),
    slow_case("chunk", "zero"),
  ],
)
def test_memora_equals_token_loop(read, retention):
  cfg = MemoryConfig(
    **{"adaptive": (), "target": "shared", "delta_rule": "none"},
    **{"momentum": "none", "step_scale": "sum", "proximal": False},
    activation="gelu",
    read=read,
    retention=retention,
    chunk_length=5,
  )
  initial = Weights(normal(4, H, F, K), normal(5, H, K, F))
  eta, alpha = (jax.nn.sigmoid(normal(seed, B, H, T)) for seed in (6, 7))
  tokens = (*sequence(), 3 * eta, alpha)

  def run(piece, state):
    k, v, q, eta, alpha = (x[:, :, piece] for x in tokens)
    gates = Gates(eta, alpha, None)
    return memora.run_memory(
      initial, deep.Tokens(k, v, q, gates), cfg, state=state
    )

  expected = over_heads(
    lambda w, x: baselines.run_memora(w, *x[:3], x[3:], cfg),
    initial._asdict(),
    tokens,
  )
  whole = fast_jit(lambda: run(slice(T), None).outputs)()
  np.testing.assert_allclose(whole, expected, atol=1e-10)
  nothing = chunks.zero_state(initial, B)
  pieces = in_pieces(run, chunks.fresh(nothing))
  np.testing.assert_allclose(pieces, expected, atol=1e-10)


def test_memora_mean_step_is_of_a_whole_chunk_in_every_piece():
  """It divides by all of a chunk's tokens, not by those of a piece."""
  cfg = MemoryConfig(
    **{"adaptive": (), "target": "shared", "delta_rule": "none"},
    **{"momentum": "none", "activation": "gelu", "proximal": False},
    **{"read": "chunk", "chunk_length": 5},
  )
  initial = Weights(normal(4, H, F, K), normal(5, H, K, F))
  eta, alpha = (jax.nn.sigmoid(normal(seed, B, H, T)) for seed in (6, 7))
  tokens = (*sequence(), 15 * eta, alpha)

  def run(piece, state, step_scale="mean"):
    k, v, q, eta, alpha = (x[:, :, piece] for x in tokens)
    eta = eta if step_scale == "mean" else eta / cfg.chunk_length
    how = dataclasses.replace(cfg, step_scale=step_scale)
    gates = Gates(eta, alpha, None)
    return memora.run_memory(
      initial, deep.Tokens(k, v, q, gates), how, state=state
    )

  expected = fast_jit(lambda: run(slice(T), None, "sum").outputs)()
  nothing = chunks.zero_state(initial, B)
  pieces = in_pieces(run, chunks.fresh(nothing))
  np.testing.assert_allclose(pieces, expected, atol=1e-10)


def changes(initial, difference):
  """Median over batch and heads of |D| / |M_0|, matrices only."""
  square = lambda tree: sum(
    np.sum(np.square(w), axis=(-2, -1)) for w in jax.tree.leaves(tree)
  )
  return np.median(np.sqrt(square(difference) / square(initial)))


@pytest.mark.parametrize("retention", ["zero", "start"])
def test_memora_logs_what_it_did(retention):
  cfg = MemoryConfig(
    **{"momentum": "none", "activation": "gelu", "delta_rule": "none"},
    **{"adaptive": (), "retention": retention, "chunk_length": 5},
  )
  initial = Weights(normal(4, H, F, K), normal(5, H, K, F))
  eta, alpha = (jax.nn.sigmoid(normal(seed, B, H, T)) for seed in (6, 7))
  nothing = chunks.zero_state(initial, B)
  out = fast_jit(
    lambda *tokens: memora.run_memory(
      initial,
      deep.Tokens(*tokens, Gates(eta, alpha, None)),
      cfg,
      state=chunks.fresh(nothing),
      with_dynamics=True,
    )
  )(*sequence())
  wanted = {
    "learn_rate": np.mean(eta),
    "half_life": np.median(np.log(0.5) / np.log(alpha)),
    "relative_change": changes(initial, out.state.now.weight),
  }
  assert out.dynamics.keys() == wanted.keys()
  for name, value in wanted.items():
    np.testing.assert_allclose(out.dynamics[name], value, err_msg=name)


@pytest.mark.parametrize("is_mlp", [False, True])
def test_ttt_equals_token_loop(is_mlp):
  cfg = MemoryConfig(chunk_length=5)
  layers = {
    "hidden": ttt.Layer(normal(4, H, F, K), normal(5, H, F)),
    "output": ttt.Layer(normal(6, H, K, F if is_mlp else K), normal(7, H, K)),
  }
  if not is_mlp:
    del layers["hidden"]
  initial = Weights(layers.get("hidden"), layers["output"])
  norm = ttt.Norm(normal(8, H, K), normal(9, H, K))
  learned = normal(10, 5) / 2 - 0.01  # c_4 is 0
  rate = jax.nn.sigmoid(normal(11, B, H, T))
  tokens = (*sequence(), rate)

  def run(piece, state):
    k, v, q, rate = (x[:, :, piece] for x in tokens)
    place = ttt.position(k.shape[2], state, cfg)
    factor = jnp.maximum(0, 1 / (1 + place) + learned[place])
    wide = lambda x: jnp.broadcast_to(x[None, None], rate.shape)
    seen = ttt.Tokens(k, v, q, rate, wide(factor), wide((place == 4) * 1.0))
    return ttt.run_memory(
      initial, norm, seen, cfg, state=state, with_dynamics=True
    )

  expected = over_heads(
    lambda w, x: baselines.run_ttt(*w, *x, learned, 5),
    (layers, tuple(norm)),
    tokens,
  )
  assert jnp.sum(1 / jnp.arange(1, 6) + learned < 0) == 1
  nothing = chunks.fresh(chunks.zero_state(initial, B))
  whole = fast_jit(lambda: run(slice(T), nothing))()
  np.testing.assert_allclose(whole.outputs, expected, atol=1e-10)
  fresh = fast_jit(lambda: run(slice(T), None))()
  np.testing.assert_allclose(fresh.outputs, expected, atol=1e-10)
  np.testing.assert_allclose(fresh.dynamics["learn_rate"], np.mean(rate))
  matrices = lambda tree: [layer.weight for layer in tree if layer]
  np.testing.assert_allclose(
    whole.dynamics["relative_change"],
    changes(matrices(initial), matrices(whole.state.now.weight)),
  )
  pieces = in_pieces(run, nothing)
  np.testing.assert_allclose(pieces, expected, atol=1e-10)
