"""Table 2: language modeling, Hope against its baselines and its twins."""
