"""The training loop and its parts: step, sharding, evaluation, metrics."""
