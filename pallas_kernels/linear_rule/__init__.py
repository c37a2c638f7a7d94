"""The learning rule of a linear fast weight.

Start in `api.py`; `reference.py` is the definition.
"""

from pallas_kernels.linear_rule.api import LinearRuleOutput as LinearRuleOutput
from pallas_kernels.linear_rule.api import linear_rule as linear_rule
