"""Memories in the kernels (interpret mode) = memories in XLA."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.config import ConfigError, MemoryConfig
from hope_jax.memory import chunks, deep, fused, rules, self_modifying
from tests.memory.test_deep import (
  B,
  float64,  # noqa: F401
  random_memory,
)
from tests.memory.test_self_modifying import random_boxes
from tests.support import compilers
from tests.support.jit import fast_jit
from tests.support.tiers import slow_case
from tests.support.trees import assert_close

KERNELS = {
  "implementation": "pallas_interpret",
  "chunk_length": 4,
  "projection_chunk_length": 4,
}


def _values_and_vjp(run, *inputs):
  """What `run` returns, and the gradients to everything that enters."""

  def both(*inputs):
    out, vjp = jax.vjp(run, *inputs)
    rng = np.random.default_rng(3)
    cotangents = jax.tree.map(lambda x: rng.normal(size=x.shape), out)
    return out, vjp(cotangents)

  return fast_jit(both)(*inputs)


def _memory(cfg, documents=None):
  """Outputs and the state after, of a memory."""

  def run(initial, sequence, gates, now):
    state = chunks.ChunkState(now, None, None)
    out = deep.run_memory(
      initial,
      deep.Tokens(*sequence, gates),
      cfg,
      state=state,
      documents=documents,
    )
    return out.outputs, out.state.now

  return run


def _boxes(cfg, documents=None):
  """Outputs and the state after, of the adaptive boxes."""

  def run(initial, p, now):
    state = chunks.ChunkState(now, None, None)
    made, state, _ = self_modifying.run_projections(
      initial, p, cfg, state=state, documents=documents
    )
    return made, state.now

  return run


def _check(make, cfg, inputs, documents=None):
  xla = dataclasses.replace(cfg, implementation="xla")
  got = _values_and_vjp(make(cfg, documents), *inputs)
  want = _values_and_vjp(make(xla, documents), *inputs)
  assert_close(got, want, 1e-10)


def _moved(initial, cfg):
  """A state after an earlier piece."""
  rng = np.random.default_rng(1)
  zero = chunks.zero_state(initial, B, has_momentum=cfg.momentum != "none")
  return jax.tree.map(lambda x: x + rng.normal(size=x.shape) / 9, zero)


def _inputs(cfg, length):
  initial, sequence, gates = random_memory(
    length=length, architecture=cfg.architecture
  )
  if cfg.momentum == "none":
    gates = gates._replace(momentum_decay=None)
  return initial, sequence, gates, _moved(initial, cfg)


# Documents of a sequence in chunks of 4.
SEGMENTS = jnp.asarray(np.repeat([[0, 0, 1, 1, 2], [3, 3, 3, 4, 4]], 4, 1))
OPTIONS = [
  {},
  {"setting": "token_exact", "read": "token_post"},
  {"read": "chunk", "momentum": "none", "architecture": "matrix"},
  slow_case({"delta_rule": "none", "target": "shared", "activation": "gelu"}),
  slow_case({"retention": "zero", "momentum": "sum", "step_scale": "sum"}),
  {"setting": "negative_eigenvalues", "architecture": "matrix"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_kernels_equal_xla_values_and_vjps(options):
  """Over several documents, from a state of an earlier piece."""
  cfg = MemoryConfig(**KERNELS, **options)
  _check(_memory, cfg, _inputs(cfg, 20), SEGMENTS)


BOXES = [
  {"adaptive": ("k", "v", "q", "eta", "alpha")},
  slow_case({"adaptive": ("v",), "momentum": "none"}),
  slow_case(
    {"adaptive": ("eta", "alpha"), "delta_rule": "none", "retention": "none"}
  ),
  {"architecture": "matrix", "retention": "zero"},
]


@pytest.mark.parametrize("options", BOXES)
def test_projections_in_kernels_equal_xla_values_and_vjps(options):
  cfg = MemoryConfig(**KERNELS, **options)
  initial, p = random_boxes(cfg)
  p = jax.tree.map(lambda x: x[:, :, :20], p)
  _check(_boxes, cfg, (initial, p, _moved(initial, cfg)), SEGMENTS)


def test_projections_in_kernels_in_subchunks(monkeypatch):
  """A long chunk's rule is solved in subchunks, of two tokens here."""
  monkeypatch.setattr(rules, "SUBCHUNK_LENGTH", 2)
  cfg = MemoryConfig(**KERNELS, adaptive=("k", "eta"))
  initial, p = random_boxes(cfg)
  p = jax.tree.map(lambda x: x[:, :, :8], p)
  _check(_boxes, cfg, (initial, p, _moved(initial, cfg)))


EIGHT = """
import dataclasses, json
import jax, numpy as np
from hope_jax.config import MeshConfig
from hope_jax.config import MemoryConfig
from hope_jax.memory import deep
from hope_jax.training import sharding
from tests.memory import test_deep

cfg = MemoryConfig(implementation="pallas_interpret", chunk_length=4)
test_deep.B, test_deep.H = 4, 6
initial, sequence, gates = test_deep.random_memory(length=12)

documents = np.repeat([[0, 0, 1], [0, 1, 1], [0, 1, 2], [1, 1, 1]], 4, 1)

def loss(initial, sequence, gates):
  tokens = deep.Tokens(*sequence, gates)
  out = deep.run_memory(initial, tokens, cfg, documents=documents)
  return out.outputs.sum()

def gradients(data, fsdp, tensor, count):
  mesh = sharding.make_mesh(
    MeshConfig(data, fsdp, tensor), jax.devices()[:count])
  with sharding.activate(mesh):
    found = jax.jit(jax.grad(loss, (0, 1, 2)))(initial, sequence, gates)
  return [np.asarray(x) for x in jax.tree.leaves(found)]

one, eight, odd = gradients(1, 1, 1, 1), gradients(2, 2, 2, 8), gradients(
  1, 2, 4, 8)  # six heads do not divide over four devices
worst = lambda a: max(float(np.abs(x - y).max()) for x, y in zip(a, one))
print(json.dumps([worst(eight), worst(odd)]))
"""


def test_kernels_run_on_every_device_of_a_mesh():
  flags = "--xla_force_host_platform_device_count=8"
  child = subprocess.run(
    [sys.executable, "-c", EIGHT],
    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert child.returncode == 0, child.stderr[-3000:]
  assert max(json.loads(child.stdout.splitlines()[-1])) < 1e-4


def test_kernels_with_an_incomplete_last_chunk():
  """A new sequence, whose last state nobody asks for."""
  cfg = MemoryConfig(**KERNELS)
  initial, sequence, gates, _ = _inputs(cfg, 19)

  def make(cfg, _):
    def run(initial, sequence, gates):
      out = deep.run_memory(initial, deep.Tokens(*sequence, gates), cfg)
      assert out.state is None
      return out.outputs

    return run

  _check(make, cfg, (initial, sequence, gates))


@pytest.mark.parametrize("sizes", [(8,), (1, 1, 1, 1, 1), (3, 1)])
def test_parts_of_chunks_are_xlas(sizes):
  """A session's state may be inside a chunk: no kernel, the same result."""
  cfg = MemoryConfig(**KERNELS)
  initial, sequence, gates, now = _inputs(cfg, sum(sizes))
  tokens = deep.Tokens(*sequence, gates)
  results = []
  for implementation in (KERNELS["implementation"], "xla"):
    used = dataclasses.replace(cfg, implementation=implementation)
    state, found, first = chunks.fresh(now), [], 0
    for size in sizes:
      here = slice(first, first + size)
      part = jax.tree.map(lambda x, here=here: x[:, :, here], tokens)
      out = deep.run_memory(initial, part, used, state=state)
      state, first = out.state, first + size
      found.append(out.outputs)
    results.append((found, state))
  assert_close(*results, 1e-14)


def test_frozen_boxes_are_xlas():
  """No kernel leaves out a box: the same result."""
  cfg = MemoryConfig(**KERNELS)
  initial, p = random_boxes(cfg)
  p = jax.tree.map(lambda x: x[:, :, :8], p)
  results = []
  for implementation in (KERNELS["implementation"], "xla"):
    made, state, _ = self_modifying.run_projections(
      initial,
      p,
      dataclasses.replace(cfg, implementation=implementation),
      state=chunks.ChunkState(_moved(initial, cfg), None, None),
      frozen=("v", "alpha"),
    )
    results.append((made, state.now))
  assert_close(*results, 1e-14)


def test_dynamics_are_xlas():
  """Kernels say nothing about the learning: it runs without them."""
  cfg = MemoryConfig(**KERNELS)
  initial, sequence, gates, _ = _inputs(cfg, 8)
  boxes, p = random_boxes(cfg)
  found = []
  for implementation in (KERNELS["implementation"], "xla"):
    used = dataclasses.replace(cfg, implementation=implementation)
    how = dict(with_dynamics=True)
    out = deep.run_memory(initial, deep.Tokens(*sequence, gates), used, **how)
    made = self_modifying.run_projections(boxes, p, used, **how)
    found.append((out.dynamics, made.dynamics))
  assert found[0][0] and found[0][1]
  assert_close(*found, 1e-14)


def test_auto_is_xla_without_a_tpu():
  assert not fused.is_chosen("auto")
  assert not fused.is_chosen("xla")
  assert fused.is_chosen("pallas_tpu") and fused.is_chosen("pallas_interpret")


def test_kernels_for_gpus_are_refused():
  cfg = MemoryConfig(**KERNELS | {"implementation": "pallas_gpu"})
  initial, sequence, gates, _ = _inputs(cfg, 8)
  with pytest.raises(ConfigError, match="no kernel for GPUs, take xla"):
    deep.run_memory(initial, deep.Tokens(*sequence, gates), cfg)


def test_kernels_raise_without_a_tpu():
  cfg = MemoryConfig(**KERNELS | {"implementation": "pallas_tpu"})
  initial, sequence, gates, _ = _inputs(cfg, 8)
  with pytest.raises(ValueError, match="interpret mode"):
    deep.run_memory(initial, deep.Tokens(*sequence, gates), cfg)


HEADS, TOKENS, DIM = 8, 4096, 128  # of a layer of 340M


def _array(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _compile_with_vjp(topology, run, *inputs):
  def both(*inputs):
    out, vjp = jax.vjp(run, *inputs)
    return out, vjp(out)

  device = compilers.tpu(topology)[0]
  with jax.enable_x64(False):
    return compilers.compile_for(device, both, *inputs)


TPUS = ["v5e:2x2", "v5:2x2x1", "v6e:2x2"]


@pytest.mark.parametrize("topology", TPUS)
def test_memory_compiles_for_tpus(topology):
  """Forward and backward, in VMEM."""
  cfg = MemoryConfig(implementation="pallas_tpu", chunk_length=64)
  compiled = _compile_with_vjp(
    topology,
    lambda *x: deep.run_memory(x[0], deep.Tokens(*x[1], x[2]), cfg).outputs,
    deep.Weights(_array(HEADS, DIM, DIM), _array(HEADS, DIM, DIM)),
    (_array(1, HEADS, TOKENS, DIM),) * 3,
    deep.Gates(*(_array(1, HEADS, TOKENS),) * 3),
  )
  assert compiled.as_text().count('"tpu_custom_call"') == 2


@pytest.mark.parametrize(
  "topology",
  ["v5e:2x2", *(pytest.param(t, marks=pytest.mark.slow) for t in TPUS[1:])],
)
def test_projections_compile_for_tpus(topology):
  cfg = MemoryConfig(implementation="pallas_tpu", projection_chunk_length=256)
  compiled = _compile_with_vjp(
    topology,
    lambda *x: self_modifying.run_projections(*x, cfg).outputs,
    self_modifying.Boxes(
      _array(HEADS, 4 * DIM, DIM),
      _array(HEADS, 2, DIM, DIM),
      _array(HEADS, 2, 1, DIM),
    ),
    self_modifying.Slow(
      *(_array(1, HEADS, TOKENS, DIM),) * 3, *(_array(1, HEADS, TOKENS),) * 3
    ),
  )
  assert compiled.as_text().count('"tpu_custom_call"') == 2
