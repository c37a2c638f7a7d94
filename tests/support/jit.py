"""Fast compilation of single functions, where modules keep optimizations."""

import functools

import jax


@functools.cache
def _fast_compiler_options():
  """Most of the time of these tests is compilation: 4 times less of it."""
  options = {"xla_backend_optimization_level": 0}
  faster = options | {"xla_cpu_use_fusion_emitters": False}
  try:
    jax.jit(lambda x: x + 1, compiler_options=faster)(0)
  except jax.errors.JaxRuntimeError:  # not an option of this jaxlib
    return options
  return faster


def fast_jit(fn):
  return jax.jit(fn, compiler_options=_fast_compiler_options())


def fast_compile(jitted, *args):
  return jitted.lower(*args).compile(_fast_compiler_options())
