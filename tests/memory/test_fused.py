"""Memories in the kernels (interpret mode) = memories in XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.config import MemoryConfig
from hope_jax.memory import chunks, deep, fused
from tests import compilers
from tests.memory.test_deep import (
  B,
  float64,  # noqa: F401
  random_memory,
)
from tests.pallas_kernels.testing import assert_close, fast_jit

KERNELS = {"implementation": "pallas_tpu", "chunk_length": 4}


@pytest.fixture(autouse=True)
def interpret(monkeypatch):
  monkeypatch.setattr(fused, "INTERPRET", True)


def _values_and_vjp(cfg, inputs, segments):
  """Outputs, the state after, and the gradients to everything that enters."""

  def run(initial, sequence, gates, now):
    out = deep.run_memory(
      initial,
      *sequence,
      gates,
      cfg,
      state=chunks.ChunkState(now, None, None),
      segments=segments,
    )
    return out.outputs, out.state.now

  def both(*inputs):
    out, vjp = jax.vjp(run, *inputs)
    rng = np.random.default_rng(3)
    cotangents = jax.tree.map(lambda x: rng.normal(size=x.shape), out)
    return out, vjp(cotangents)

  return fast_jit(both)(*inputs)


def _inputs(cfg, length):
  initial, sequence, gates = random_memory(
    length=length, architecture=cfg.architecture
  )
  if cfg.momentum == "none":
    gates = gates._replace(momentum_decay=None)
  now = deep.zero_state(initial, B, cfg)
  rng = np.random.default_rng(1)
  now = jax.tree.map(lambda x: x + rng.normal(size=x.shape) / 9, now)
  return initial, sequence, gates, now


OPTIONS = [
  {},
  {"setting": "token_exact", "read": "token_post"},
  {"read": "chunk", "momentum": "none", "architecture": "matrix"},
  {"delta_rule": "none", "target": "shared", "activation": "gelu"},
  {"retention": "zero", "momentum": "sum", "step_scale": "sum"},
  {"setting": "negative_eigenvalues", "architecture": "matrix"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_kernels_equal_xla_values_and_vjps(options):
  """Over several documents, from a state of an earlier piece."""
  cfg = MemoryConfig(**KERNELS, **options)
  inputs = _inputs(cfg, 20)
  segments = jnp.asarray(np.repeat([[0, 0, 1, 1, 2], [3, 3, 3, 4, 4]], 4, 1))
  got = _values_and_vjp(cfg, inputs, segments)
  xla = dataclasses.replace(cfg, implementation="xla")
  assert_close(got, _values_and_vjp(xla, inputs, segments), 1e-10)


def test_kernels_with_an_incomplete_last_chunk():
  cfg = MemoryConfig(**KERNELS)
  initial, sequence, gates, _ = _inputs(cfg, 19)

  def loss(cfg):
    run = lambda initial, sequence, gates: (
      deep.run_memory(initial, *sequence, gates, cfg).outputs
    )

    def both(*inputs):
      out, vjp = jax.vjp(run, *inputs)
      return out, vjp(out)

    return fast_jit(both)(initial, sequence, gates)

  xla = dataclasses.replace(cfg, implementation="xla")
  assert_close(loss(cfg), loss(xla), 1e-10)


def test_pieces_of_chunks_are_xlas():
  """A session's state may stand inside a chunk: no kernel, the same result."""
  cfg = MemoryConfig(**KERNELS)
  initial, sequence, gates, now = _inputs(cfg, 8)
  results = []
  for implementation in ("pallas_tpu", "xla"):
    used = dataclasses.replace(cfg, implementation=implementation)
    out = deep.run_memory(
      initial, *sequence, gates, used, state=chunks.fresh(now)
    )
    results.append((out.outputs, out.state.now))
  assert_close(*results, 1e-14)


def test_auto_is_xla_without_a_tpu():
  assert not fused.is_chosen("auto")
  assert not fused.is_chosen("xla")
  assert fused.is_chosen("pallas_tpu")


def test_kernels_raise_without_a_tpu(monkeypatch):
  monkeypatch.setattr(fused, "INTERPRET", False)
  cfg = MemoryConfig(**KERNELS)
  initial, sequence, gates, _ = _inputs(cfg, 8)
  with pytest.raises(ValueError, match="interpret mode"):
    deep.run_memory(initial, *sequence, gates, cfg)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5:2x2x1", "v6e:2x2"])
def test_memory_compiles_for_tpus(topology, monkeypatch):
  """One layer of Titans 340M, forward and backward, in VMEM."""
  monkeypatch.setattr(fused, "INTERPRET", False)
  heads, tokens, dim = 8, 4096, 128
  cfg = MemoryConfig(implementation="pallas_tpu", chunk_length=64)
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  sequence = (array(1, heads, tokens, dim),) * 3
  gates = deep.Gates(*(array(1, heads, tokens),) * 3)
  initial = deep.Weights(array(heads, dim, dim), array(heads, dim, dim))

  def both(initial, sequence, gates):
    run = lambda *x: deep.run_memory(x[0], *x[1], x[2], cfg).outputs
    out, vjp = jax.vjp(run, initial, sequence, gates)
    return out, vjp(out)

  with jax.enable_x64(False):
    compiled = compilers.compile_for(
      compilers.tpu(topology)[0], both, initial, sequence, gates
    )
  assert compiled.as_text().count('"tpu_custom_call"') == 2
