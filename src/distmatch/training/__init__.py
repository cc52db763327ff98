"""The training loop and what it needs of any method: optimizers, averages, checkpoints, logs, spreading."""
