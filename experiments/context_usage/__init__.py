"""Whether more context helps (Figure 10)."""
