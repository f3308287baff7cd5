"""Reads exported graphs, and turns them into their float32 copies, for ONNX Runtime on CPU.

ONNX Runtime's CPU kernels are slow or unfused in float16 (INT8 Q/DQ in float16 runs 32 times slower than float32), so the
session loads the exported file and computes it in float32: same integers, same scales, float weights widened when loaded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from qvlm_export.calibrate.errors import DAMAGED_FILE_ERRORS, UserError

NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def read_graph(graph: Path, data: Path | None = None) -> ir.Model:
    """Returns an exported graph, whose weights are read from `data` when they are needed.

    data: by default the file that an export writes beside the graph. Both may be links to files elsewhere that have other
    names, as in a store of models, which onnx refuses: it cannot know that the file was chosen by us. So every weight is
    checked to lie in that one file. Raises UserError when it does not, or when the graph is damaged.
    """
    data = graph.with_name(f"{graph.name}.data") if data is None else data
    try:
        model = ir.from_proto(onnx.load(str(graph), load_external_data=False))
    except DAMAGED_FILE_ERRORS as error:
        raise UserError(f"{graph}: not a readable ONNX graph ({type(error).__name__}); export again") from error
    for name, value in model.graph.initializers.items():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            if str(tensor.location) != data.name:
                raise UserError(f"{graph}: the weight {name} lies in {tensor.location}, not in {data.name}; export again")
            value.const_value = locate(tensor, data.resolve())
    return model


def locate(tensor: ir.ExternalTensor, path: Path | str) -> ir.ExternalTensor:
    """Returns the same tensor in another file: `path` is absolute, or relative to where the graph will be read."""
    shape = ir.Shape(tensor.shape)
    return ir.ExternalTensor(str(path), tensor.offset, tensor.length, tensor.dtype, shape=shape, name=tensor.name or "")


def to_float32(model: ir.Model) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Pass: rewrites `model` to float32, in place; returns it and the widened weights, name -> float32 array.

    The caller can hand the widened weights to ONNX Runtime directly, without writing them to a file. Integer weights are not
    loaded.
    """
    widened: dict[str, np.ndarray] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in NARROW:
            widened[str(name)] = np.asarray(tensor.numpy(), np.float32)
            value.const_value = ir.Tensor(widened[str(name)], name=value.name)
            value.dtype = ir.DataType.FLOAT
    for node in model.graph:
        _widen_attributes(node)
        for output in node.outputs:
            if output.dtype in NARROW:
                output.dtype = ir.DataType.FLOAT
    for graph_input in model.graph.inputs:
        if graph_input.dtype in NARROW:
            graph_input.dtype = ir.DataType.FLOAT
    _split_quantizers(model)
    _split_zero_points(model)
    return model, widened


def _widen_attributes(node: ir.Node) -> None:
    """Widens a node's constant, or the type it casts or dequantizes to."""
    for key, attribute in list(node.attributes.items()):
        if key in ("to", "output_dtype") and attribute.as_int() in [d.value for d in NARROW]:
            node.attributes[key] = ir.AttrInt64(key, ir.DataType.FLOAT.value)
        elif key == "value" and attribute.as_tensor().dtype in NARROW:
            wide = np.asarray(attribute.as_tensor().numpy(), np.float32)
            node.attributes[key] = ir.AttrTensor(key, ir.tensor(wide))


def _split_quantizers(model: ir.Model) -> None:
    """Gives every DequantizeLinear its own QuantizeLinear, because ONNX Runtime fuses an INT8 product only then."""
    for node in list(model.graph):
        if node.op_type != "QuantizeLinear":
            continue
        for index, (reader, input_index) in enumerate(list(node.outputs[0].uses())[1:], start=1):
            copy = ir.node("QuantizeLinear", list(node.inputs), name=f"{node.name}.{index}")
            copy.outputs[0].name = f"{node.outputs[0].name}.{index}"
            copy.outputs[0].dtype = ir.DataType.INT8
            model.graph.insert_after(node, copy)
            reader.replace_input_with(input_index, copy.outputs[0])


def _split_zero_points(model: ir.Model) -> None:
    """Gives the weights of every linear their own zero point.

    On processors that need unsigned weights, ONNX Runtime converts weights and zero points linear by linear, and fails on a
    shared zero point, which it would convert twice.
    """
    for node in list(model.graph):
        codes, shared = (node.inputs[0], node.inputs[2]) if len(node.inputs) == 3 else (None, None)
        if node.op_type != "DequantizeLinear" or codes is None or shared is None or not codes.is_initializer():
            continue
        zero_point = ir.Value(
            name=f"{codes.name}_zero_point",
            shape=shared.shape,
            type=shared.type,
            const_value=shared.const_value,
        )
        model.graph.register_initializer(zero_point)
        node.replace_input_with(2, zero_point)
