"""What learns when in a model, what it costs, and its logged dynamics."""
