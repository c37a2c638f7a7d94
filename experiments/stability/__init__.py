"""Stability: critical rates, long streams, and what literal settings do."""
