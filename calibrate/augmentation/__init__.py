"""Calibration-set augmentation: cross-paired questions and random word replacement."""
