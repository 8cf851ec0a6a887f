"""What every run needs and no algorithm does: run folder, metrics, checkpoints, signals."""
