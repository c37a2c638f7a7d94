"""The learning rule of a linear fast weight; start in `api.py`."""

from pallas_kernels.linear_rule.api import LinearRuleOutput as LinearRuleOutput
from pallas_kernels.linear_rule.api import linear_rule as linear_rule
