"""What the kernels share: scans over chunks, trees of refs."""
