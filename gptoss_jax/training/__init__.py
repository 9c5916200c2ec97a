"""Training: data to batches, batches to gradients, gradients to a checkpoint."""
