"""A pre-training run: one loop, any number of processes, checkpoints, logs."""
