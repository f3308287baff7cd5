"""Quantizers, calibration and the calibrated checkpoint. Knows no ONNX and no TensorRT."""
