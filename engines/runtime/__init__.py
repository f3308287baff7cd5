"""Runs exported models on TensorRT or ONNX Runtime: runners, sessions, sampling."""
