"""Texts that the experiments train on and how they are prepared."""
