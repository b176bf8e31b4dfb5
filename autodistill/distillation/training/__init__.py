"""One training: steps, learning rate, optimizers, checkpoints, several processes."""
