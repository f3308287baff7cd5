"""Cells of the methods benchmark: what a model computes for one, its scores, and the file of results."""
