"""The training loop and its parts: step, sharding, checkpoints, metrics."""
