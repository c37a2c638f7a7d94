"""What the levels of the continuum memory system should learn from."""
