"""Reading checkpoints of every model family and layout."""
