"""Outer-loop optimizers, which train the slow weights."""
