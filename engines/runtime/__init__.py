"""Sessions on TensorRT and ONNX Runtime."""
