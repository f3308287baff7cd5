"""Float, fake-quantized, graph and engine compared on the same samples."""
