"""Trained models at work: opened, evaluated, continued, held sessions with."""
