"""Released quantizers that the benchmark compares with, each in an environment of its own."""
