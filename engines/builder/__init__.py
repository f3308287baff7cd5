"""TensorRT engines from graphs, in a process of their own."""
