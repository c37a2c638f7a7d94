"""Task files for lm-eval, see ../README.md."""
