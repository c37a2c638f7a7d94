"""What a model is, counted without running it."""
