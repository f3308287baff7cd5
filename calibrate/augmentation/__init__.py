"""Calibration-set augmentation: cross-paired questions, mixup of image features, random word replacement."""
