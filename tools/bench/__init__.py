"""Benchmarks: methods, whole exports, one block, runtime."""
