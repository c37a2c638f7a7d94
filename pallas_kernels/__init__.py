"""Kernels: one folder per operation, `api.py` validates and dispatches."""
