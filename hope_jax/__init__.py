"""Nested Learning in JAX: Hope, Titans, their optimizers and baselines."""

__version__ = "0.1.0"
