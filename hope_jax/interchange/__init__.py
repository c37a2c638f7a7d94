"""Conversion of runs to and from the formats of other programs."""
