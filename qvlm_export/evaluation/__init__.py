"""Benchmarks asked of any form of the model."""
