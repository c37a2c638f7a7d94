"""Checks and times this project on one GPU; `scripts/gpu_check.sh` starts it.

`__main__.py` works through the jobs of `plan.py`, each in a process of its own
(`children.py` starts it, `child.py` runs in it), and writes all results after
every job (`report.py`).  These files need no package at all.

A job is a call of `rows(...)` in the module of its part, an iterator of dicts:
`kernels.py`, `training.py`, `memories.py`, `decoding.py` and `profiling.py`.  A
row is kept as soon as it is yielded; a later one with the same `row` replaces
it.
"""
