"""Writes a graph and its external data; weights are read, converted and packed one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.external_data import CallbackInfo


def write_graph(model: ir.Model, path: Path, progress: Callable[[float], None]) -> None:
    """Writes `path` and `path`.data, and runs onnx's full checker on the result; progress(fraction of tensors written)."""

    def report(_: ir.TensorProtocol, info: CallbackInfo) -> None:
        progress((info.index + 1) / info.total)

    ir.save(model, path, external_data=f"{path.name}.data", callback=report)
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
