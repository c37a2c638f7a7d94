"""Configurations: one file per family of runs, with `get_config(arg)`."""
