"""Checks and times this project on one GPU; `scripts/gpu_check.sh` starts it.

`__main__.py` works through the jobs of `plan.py`, each in a process of its own
(`children.py` starts it, `child.py` is what runs there), and writes what they
found after every one (`report.py`).  These files need no package at all.

A job is a call of `rows(...)` in the module of its part, an iterator of dicts:
`kernels.py`, `training.py`, `memories.py`, `decoding.py` and `profiling.py`.  A
row is kept from the moment it is there; a later one with the same `row` takes
its place.
"""
