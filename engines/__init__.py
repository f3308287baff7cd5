"""ONNX graphs and TensorRT engines of a LLaVA, and the session that runs them. No module here imports torch."""
