"""The training loop and what any method needs from it: optimizers, EMA, checkpoints, logs, data parallelism."""
