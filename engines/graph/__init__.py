"""ONNX graphs: declared as float modules, rewritten to Q/DQ patterns by passes, and written to disk."""
