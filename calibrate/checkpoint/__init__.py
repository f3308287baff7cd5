"""Data and file formats of calibration, without torch: samples, schemes, float weights, the calibrated checkpoint."""
