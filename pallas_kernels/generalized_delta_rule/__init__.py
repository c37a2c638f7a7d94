"""A matrix state with a decay per channel and a rank-one erase.

Start in `api.py`; `reference.py` is the definition.  There are no kernels yet,
hence no `pallas_tpu.py`, `pallas_gpu.py` and `tuning.py`.
"""

from pallas_kernels.generalized_delta_rule.api import (
  generalized_delta_rule as generalized_delta_rule,
)
from pallas_kernels.generalized_delta_rule.one_chunk import (
  MAX_CHUNK_LENGTH as MAX_CHUNK_LENGTH,
)
from pallas_kernels.generalized_delta_rule.reference import (
  DeltaRuleOutput as DeltaRuleOutput,
)
