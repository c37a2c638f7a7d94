"""Flax Linen models: one block, one language model, a file per layer."""
