"""Writes an ONNX graph and its external data file, with few tensors in memory at a time.

The weights are lazy tensors: each is read, converted and packed when it is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.external_data import CallbackInfo

# Threads that pack tensors while others are written, and the bytes they may hold together; a larger tensor is packed alone.
WORKERS, AT_WORK_BYTES = min(4, os.cpu_count() or 1), 2**29


def write_graph(model: ir.Model, path: Path, progress: Callable[[float], None]) -> None:
    """Writes `path` and `path`.data, and runs onnx's full checker on them. progress: called with the fraction of tensors."""
    num_started = 0

    def report(_: ir.TensorProtocol, info: CallbackInfo) -> None:  # one call at a time, but in any order of tensors
        nonlocal num_started
        num_started += 1
        progress(num_started / info.total)

    data = f"{path.name}.data"
    ir.save(model, path, external_data=data, callback=report, max_workers=WORKERS, max_in_flight_bytes=AT_WORK_BYTES)
    onnx.checker.check_model(str(path), full_check=True)


def interface(model: ir.Model) -> dict[str, list[dict[str, object]]]:
    """Returns names, types and shapes of the graph's inputs and outputs, for the manifest."""

    def describe(value: ir.Value) -> dict[str, object]:
        shape = [d if isinstance(d, int) else str(d) for d in value.shape or ()]
        return {"name": value.name, "type": value.dtype.name.lower() if value.dtype else "unknown", "shape": shape}

    return {
        "inputs": [describe(v) for v in model.graph.inputs],
        "outputs": [describe(v) for v in model.graph.outputs],
    }
