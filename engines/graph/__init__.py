"""ONNX graphs: declared as float modules, rewritten to Q/DQ, written."""
