"""The paper's tables and figures: a folder each, one runner for all."""
