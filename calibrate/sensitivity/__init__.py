"""Sensitivity of the model's output to quantization errors: token weights and output Hessians from backward passes."""
