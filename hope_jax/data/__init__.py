"""Sources of training and evaluation examples, and the input pipeline."""
