"""Kernels: one folder per operation, and `common` for what they share.

In a folder `api.py` validates and dispatches to an implementation:
`reference.py`, the definition token by token; `xla.py`, by chunks;
`pallas_tpu.py` and `pallas_gpu.py` with the sizes of `tuning.py`, where there
are kernels.  `one_chunk.py` has the maths of one chunk, which they share.
docs/equations.md has the equations of all.
"""
