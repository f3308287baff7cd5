"""Writes a graph and its external data; weights are read, converted and packed one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.external_data import CallbackInfo

# One tensor is packed while another is written; bytes of those that are at work together, a larger one being alone.
WORKERS, AT_WORK_BYTES = min(4, os.cpu_count() or 1), 2**29


def write_graph(model: ir.Model, path: Path, progress: Callable[[float], None]) -> None:
    """Writes `path` and `path`.data, and runs onnx's full checker on the result; progress(fraction of tensors written)."""
    begun = 0

    def report(_: ir.TensorProtocol, info: CallbackInfo) -> None:  # called one at a time, in no order
        nonlocal begun
        begun += 1
        progress(begun / info.total)

    data = f"{path.name}.data"
    ir.save(model, path, external_data=data, callback=report, max_workers=WORKERS, max_in_flight_bytes=AT_WORK_BYTES)
    onnx.checker.check_model(str(path), full_check=True)


def interface(model: ir.Model) -> dict[str, list[dict[str, object]]]:
    """Names, types and shapes of inputs and outputs, for the manifest."""

    def describe(value: ir.Value) -> dict[str, object]:
        shape = [d if isinstance(d, int) else str(d) for d in value.shape or ()]
        return {"name": value.name, "type": value.dtype.name.lower() if value.dtype else "unknown", "shape": shape}

    return {
        "inputs": [describe(v) for v in model.graph.inputs],
        "outputs": [describe(v) for v in model.graph.outputs],
    }
