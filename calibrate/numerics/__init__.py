"""Fast float32 matrix maths, the same to the last bit on any number of threads."""
