"""Post-training quantization methods: round-to-nearest (`rtn`), and the block-wise search of `fast` and `full`."""
