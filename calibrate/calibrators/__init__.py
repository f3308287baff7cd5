"""The efforts: rtn, and the block-wise search of fast and full."""
