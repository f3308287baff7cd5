"""The model one block at a time: forward pass, loading weights, keeping activations, resuming."""
