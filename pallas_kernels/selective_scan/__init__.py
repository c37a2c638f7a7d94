"""Mamba's recurrence: a state per channel, every number with its own decay.

Start in `api.py`; `reference.py` is the definition.  There are no kernels yet,
hence no `pallas_tpu.py`, `pallas_gpu.py` and `tuning.py`; the maths of one
chunk is an associative scan in `xla.py`.
"""

from pallas_kernels.selective_scan.api import selective_scan as selective_scan
from pallas_kernels.selective_scan.reference import ScanOutput as ScanOutput
