"""Which parts of Hope matter (Table 6)."""
