"""Checks of a written ONNX graph: its quantized weights against the calibrated checkpoint, and the outputs of its blocks.

`wrong_weights` compares integers and scales bit by bit. `run_blocks` computes the output of every block, so that a
deviation can be located.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.manifest import Manifest
from qvlm_export.engines.runtime.float32_graph import read_graph
from qvlm_export.engines.runtime.onnx_runner import open_float32_model

PARTS = ("vision", "language")
_QUANTIZERS = ("DequantizeLinear", "Clip", "QuantizeLinear")


@dataclass(frozen=True)
class WrongWeight:
    """A linear whose weights or activation scale in the graph differ from the calibrated ones; `what` says how."""

    linear: str
    what: str


def wrong_weights(graph: Path, calibrated: CalibratedCheckpoint, linears: list[str]) -> Iterator[WrongWeight]:
    """Compares the integers and scales of `linears` in the graph with the calibrated ones, bit by bit; yields what differs.

    One linear at a time is in memory. Raises UserError when an initializer of the graph has no data.
    """
    model = read_graph(graph)
    matmuls = {str(node.name): node for node in model.graph if node.op_type == "MatMul"}
    for name in linears:
        if name not in matmuls or f"{name}.weight_codes" not in model.graph.initializers:
            yield WrongWeight(name, "is not quantized in the graph")
            continue
        expected, matmul = calibrated.linear(name), matmuls[name]
        codes, scale = (_read_initializer(model, f"{name}.{part}") for part in ("weight_codes", "weight_scale"))
        if differing := int((expected.codes != codes.astype(np.int8).T).sum()):
            yield WrongWeight(name, f"{differing} of {expected.codes.size} integers differ")
        if differing := int((scale.T.astype(np.float32) != expected.scale.astype(np.float32)).sum()):
            yield WrongWeight(name, f"{differing} of {expected.scale.size} scales differ")
        scales, code_range = _read_activation_quantizer(matmul)
        if scales != ([] if expected.input_scale is None else [expected.input_scale] * 2):
            yield WrongWeight(name, f"activation scales {scales} differ from the calibrated {expected.input_scale}")
        elif (bits := expected.scheme.activation_bits) and code_range != (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1):
            yield WrongWeight(name, f"activation codes {list(code_range)} are not those of {bits} bits")


def _read_initializer(model: ir.Model, name: str) -> np.ndarray:
    return _read_constant(model.graph.initializers[name])


def _read_constant(value: ir.Value) -> np.ndarray:
    if value.const_value is None:
        raise UserError(f"{value.name}: has no data in the graph; export again")
    return np.asarray(value.const_value.numpy())


def _read_activation_quantizer(matmul: ir.Node) -> tuple[list[float], tuple[int, int]]:
    """Returns how the activation of a product is quantized: its scales and the range (lowest, highest) of its codes.

    The scales are those of DequantizeLinear and QuantizeLinear; the list is empty where the activation stays float.
    """
    scales: list[float] = []
    low, high = -128, 127
    value = matmul.inputs[0]
    while value is not None and (node := value.producer()) is not None and node.op_type in _QUANTIZERS:
        parameters = [_read_constant(v) for v in node.inputs[1:] if v is not None]
        if node.op_type == "Clip":
            low, high = (int(bound) for bound in parameters)
        else:
            scales.append(float(parameters[0]))
        value = node.inputs[0]
    return scales, (low, high)


def block_outputs(model: ir.Model, last_linears: Mapping[str, str]) -> dict[str, ir.Value]:
    """Returns block -> its output in the graph, after the bias and the residual of its last linear.

    last_linears: block -> its last linear; blocks that are not in this graph are left out.
    """
    matmuls = {str(node.name): node for node in model.graph if node.op_type == "MatMul"}
    outputs = {}
    for block, linear in last_linears.items():
        if linear not in matmuls:
            continue
        value = matmuls[linear].outputs[0]
        while (reader := _only_reader(value)) is not None and reader.op_type == "Add":
            value = reader.outputs[0]
            if all(v is not None and not v.is_initializer() for v in reader.inputs):
                break  # both inputs are computed: this Add is the residual
        outputs[block] = value
    return outputs


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = [node for node, _ in value.uses()]
    return readers[0] if len(readers) == 1 else None


def run_blocks(
    manifest: Manifest, last_linears: Mapping[str, str], feeds: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns block -> its output, computed in float32 by ONNX Runtime. feeds: part -> inputs of its graph.

    Raises UserError when ONNX Runtime cannot load a graph.
    """
    outputs: dict[str, np.ndarray] = {}
    for part, feed in feeds.items():
        data = manifest.file(f"{part}_data")
        model = read_graph(manifest.file(f"{part}_onnx"), data)
        block_values = block_outputs(model, last_linears)
        for value in block_values.values():
            value.dtype = value.dtype or ir.DataType[manifest.float_type.upper()]
        model.graph.outputs[:] = list(block_values.values())
        session = open_float32_model(model, data)
        wide_feed = {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in feed.items()}
        outputs |= dict(zip(block_values, session.run([str(v.name) for v in block_values.values()], wide_feed), strict=True))
    return outputs
