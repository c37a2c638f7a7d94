"""What the kernels move, counted from their block specs."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hope_jax.config import MemoryConfig
from hope_jax.memory import deep, self_modifying
from tests.pallas_kernels import traffic

BATCH, HEADS, TOKENS, DIM = 2, 8, 4096, 128


def _array(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _with_vjp(run):
  def both(*inputs):
    out, vjp = jax.vjp(run, *inputs)
    return out, vjp(out)

  return both


def test_traffic_counts_blocks_where_they_change():
  def kernel(x_ref, y_ref, o_ref):
    o_ref[...] = x_ref[...] + y_ref[...]

  def run(x, y):
    return pl.pallas_call(
      kernel,
      grid=(2, 3),
      in_specs=[
        pl.BlockSpec((8, 128), lambda i, j: (i, 0)),  # stays for three steps
        pl.BlockSpec((8, 128), lambda i, j: (j, 0)),  # read twice over
      ],
      out_specs=pl.BlockSpec((8, 128), lambda i, j: (3 * i + j, 0)),
      out_shape=jax.ShapeDtypeStruct((48, 128), jnp.float32),
      name="add",
    )(x, y)

  block = 8 * 128 * 4
  found = traffic.of_kernels(run, _array(16, 128), _array(24, 128))
  assert found == [
    traffic.Traffic("add", moved=(2 + 6 + 6) * block, floor=(2 + 3 + 6) * block)
  ]


def test_memory_moves_little_more_than_its_arrays():
  cfg = MemoryConfig(implementation="pallas_tpu", chunk_length=64)
  found = traffic.of_kernels(
    _with_vjp(
      lambda *x: deep.run_memory(x[0], deep.Tokens(*x[1], x[2]), cfg).outputs
    ),
    deep.Weights(_array(HEADS, DIM, DIM), _array(HEADS, DIM, DIM)),
    (_array(BATCH, HEADS, TOKENS, DIM),) * 3,
    deep.Gates(*(_array(BATCH, HEADS, TOKENS),) * 3),
  )
  assert [call.name for call in found] == ["memory_forward", "memory_backward"]
  for call in found:
    assert call.floor <= call.moved < 1.5 * call.floor, call


def test_projections_move_little_more_than_their_arrays():
  cfg = MemoryConfig(implementation="pallas_tpu", projection_chunk_length=256)
  found = traffic.of_kernels(
    _with_vjp(lambda *x: self_modifying.run_projections(*x, cfg).outputs),
    self_modifying.Boxes(
      _array(HEADS, 4 * DIM, DIM),
      _array(HEADS, 2, DIM, DIM),
      _array(HEADS, 2, 1, DIM),
    ),
    self_modifying.Slow(
      *(_array(BATCH, HEADS, TOKENS, DIM),) * 3,
      *(_array(BATCH, HEADS, TOKENS),) * 3,
    ),
  )
  assert len(found) == 2
  for call in found:
    assert call.floor <= call.moved < 1.5 * call.floor, call
