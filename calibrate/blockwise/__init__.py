"""The model one block at a time: forward pass, offloading, activation cache, resuming."""
