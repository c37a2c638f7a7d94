"""A matrix state with a decay per channel and a rank-one erase.

Start in `chunked.py`; `reference.py` is the definition.
"""

from pallas_kernels.generalized_delta_rule.chunked import (
  generalized_delta_rule as generalized_delta_rule,
)
from pallas_kernels.generalized_delta_rule.reference import (
  DeltaRuleOutput as DeltaRuleOutput,
)
