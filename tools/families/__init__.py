"""Random checkpoints of every model family, and their comparison with transformers."""
