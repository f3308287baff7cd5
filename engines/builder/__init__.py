"""Builds TensorRT engines from ONNX graphs, in a child process."""
