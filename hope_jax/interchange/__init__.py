"""Whole runs for other programs, and the other way round."""
