"""Outer-loop optimizers: what trains the slow weights."""
