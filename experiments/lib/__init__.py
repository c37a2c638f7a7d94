"""What all experiments share: the runner, trials, tables and plots."""
