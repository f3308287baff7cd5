"""What quantization errors cost the model's output: gradients through the float model."""
