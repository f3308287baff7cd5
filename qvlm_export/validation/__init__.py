"""Validation of an export: float, fake-quantized, graph and engine forms are compared on the same samples."""
