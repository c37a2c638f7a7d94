"""A run on a machine: its folder, its files, its processes."""
