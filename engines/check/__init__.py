"""Checks of written graphs and built engines: weights, operand types, outputs."""
