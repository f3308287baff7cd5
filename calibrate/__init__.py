"""Post-training quantization: calibration, rounding and the calibrated checkpoint, independent of ONNX and TensorRT."""
