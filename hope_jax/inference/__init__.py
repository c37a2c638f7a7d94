"""Inference with trained models: evaluation, generation, scoring, sessions."""
