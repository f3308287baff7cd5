"""ONNX graphs, TensorRT engines and the session that runs them. Knows no torch."""
