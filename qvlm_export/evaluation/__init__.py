"""Evaluation of any form of a model on visual question answering benchmarks."""
