"""Looks inside a written graph: does it hold the calibrated integers, and what does each block compute?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.manifest import Manifest
from qvlm_export.engines.runtime.onnx_runner import open_float32_session

PARTS = ("vision", "language")
_QUANTIZERS = ("DequantizeLinear", "Clip", "QuantizeLinear")


@dataclass(frozen=True)
class WrongWeight:
    """A linear of the graph that is not what was calibrated, and in what."""

    linear: str
    what: str


def wrong_weights(graph: Path, calibrated: CalibratedCheckpoint, linears: list[str]) -> Iterator[WrongWeight]:
    """Compares integers and scales of `linears` in the graph with the calibrated ones, bit by bit, one at a time."""
    model = ir.load(graph)
    products = {str(node.name): node for node in model.graph if node.op_type == "MatMul"}
    for name in linears:
        if name not in products or f"{name}.weight_codes" not in model.graph.initializers:
            yield WrongWeight(name, "is not quantized in the graph")
            continue
        wanted, found = calibrated.linear(name), products[name]
        codes, scale = (_initializer(model, f"{name}.{part}") for part in ("weight_codes", "weight_scale"))
        if differing := int((wanted.codes != codes.astype(np.int8).T).sum()):
            yield WrongWeight(name, f"{differing} of {wanted.codes.size} integers differ")
        if differing := int((scale.T.astype(np.float32) != wanted.scale.astype(np.float32)).sum()):
            yield WrongWeight(name, f"{differing} of {wanted.scale.size} scales differ")
        scales, codes_range = _activation(found)
        if scales != ([] if wanted.input_scale is None else [wanted.input_scale] * 2):
            yield WrongWeight(name, f"activation scales {scales} differ from the calibrated {wanted.input_scale}")
        elif (bits := wanted.scheme.activation_bits) and codes_range != (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1):
            yield WrongWeight(name, f"activation codes {list(codes_range)} are not those of {bits} bits")


def _initializer(model: ir.Model, name: str) -> np.ndarray:
    return _value(model.graph.initializers[name])


def _value(value: ir.Value) -> np.ndarray:
    if value.const_value is None:
        raise UserError(f"{value.name}: has no data in the graph; export again")
    return np.asarray(value.const_value.numpy())


def _activation(product: ir.Node) -> tuple[list[float], tuple[int, int]]:
    """What quantizes a product's activation: scales of DequantizeLinear and QuantizeLinear, and the range of the codes.

    No scales where the activation stays float.
    """
    scales: list[float] = []
    low, high = -128, 127
    value = product.inputs[0]
    while value is not None and (node := value.producer()) is not None and node.op_type in _QUANTIZERS:
        parameters = [_value(v) for v in node.inputs[1:] if v is not None]
        if node.op_type == "Clip":
            low, high = (int(bound) for bound in parameters)
        else:
            scales.append(float(parameters[0]))
        value = node.inputs[0]
    return scales, (low, high)


def block_outputs(model: ir.Model, last_linears: Mapping[str, str]) -> dict[str, ir.Value]:
    """The output of each block (block -> its last linear) that is in the graph: behind that linear's bias and residual."""
    products = {str(node.name): node for node in model.graph if node.op_type == "MatMul"}
    found = {}
    for block, linear in last_linears.items():
        if linear not in products:
            continue
        value = products[linear].outputs[0]
        while (reader := _only_reader(value)) is not None and reader.op_type == "Add":
            value = reader.outputs[0]
            if all(v is not None and not v.is_initializer() for v in reader.inputs):
                break  # that was the residual
        found[block] = value
    return found


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = [node for node, _ in value.uses()]
    return readers[0] if len(readers) == 1 else None


def run_blocks(
    manifest: Manifest, last_linears: Mapping[str, str], feeds: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Output of every block of both graphs, on ONNX Runtime, float32. feeds: part -> inputs of its graph.

    The graph with more outputs is a small file beside the shipped one, whose weights it reads; it is removed again.
    """
    outputs: dict[str, np.ndarray] = {}
    for part, feed in feeds.items():
        graph, data = manifest.file(f"{part}_onnx"), manifest.file(f"{part}_data")
        model = ir.load(graph)
        marked = block_outputs(model, last_linears)
        for value in marked.values():
            value.dtype = value.dtype or ir.DataType[manifest.float_type.upper()]
        model.graph.outputs[:] = list(marked.values())
        probe = graph.with_name(f".{graph.stem}.probe.onnx")
        try:
            ir.save(model, probe)
            session = open_float32_session(probe, data)
        except OSError as error:
            raise UserError(f"{probe}: cannot be written ({error.strerror}); --per-layer needs to write there") from error
        finally:
            probe.unlink(missing_ok=True)
        wide = {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in feed.items()}
        outputs |= dict(zip(marked, session.run([str(v.name) for v in marked.values()], wide), strict=True))
    return outputs
