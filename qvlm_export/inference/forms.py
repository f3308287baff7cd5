"""The four forms of a model, under the names that every command, record and table gives them."""

from __future__ import annotations

FLOAT = "float"  # the checkpoint in torch
FAKE_QUANT = "fake-quant"  # the calibrated checkpoint in torch, inputs and weights fake-quantized
GRAPH = "graph"  # the Q/DQ graph on ONNX Runtime
ENGINE = "engine"  # the TensorRT engine
MODEL_FORMS = (FLOAT, FAKE_QUANT, GRAPH, ENGINE)
IN_TORCH = (FLOAT, FAKE_QUANT)
