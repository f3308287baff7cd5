"""The float32 twin of a shipped graph, for ONNX Runtime on CPU.

ONNX Runtime's CPU kernels are slow or unfused in float16 (INT8 Q/DQ in float16 runs 32 times slower than float32), so the
session computes the very file that was shipped in float32: same integers, same scales, weights widened when loaded.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def to_float32(model: ir.Model) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Rewrites `model` in place to float32.

    Returns it with the widened weights by name; they are taken out of the graph's own tensors so that the caller can hand
    them to ONNX Runtime without a copy through a file. Integer weights stay where they are on disk.
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
    """Constants, and the `to` and `output_dtype` of casts."""
    for key, attribute in list(node.attributes.items()):
        if key in ("to", "output_dtype") and attribute.as_int() in [d.value for d in NARROW]:
            node.attributes[key] = ir.AttrInt64(key, ir.DataType.FLOAT.value)
        elif key == "value" and attribute.as_tensor().dtype in NARROW:
            wide = np.asarray(attribute.as_tensor().numpy(), np.float32)
            node.attributes[key] = ir.AttrTensor(key, ir.tensor(wide))


def _split_quantizers(model: ir.Model) -> None:
    """Gives every DequantizeLinear a QuantizeLinear of its own: ONNX Runtime fuses an INT8 product only then."""
    for node in list(model.graph):
        if node.op_type != "QuantizeLinear":
            continue
        for number, (reader, index) in enumerate(list(node.outputs[0].uses())[1:], start=1):
            copy = ir.node("QuantizeLinear", list(node.inputs), name=f"{node.name}.{number}")
            copy.outputs[0].name = f"{node.outputs[0].name}.{number}"
            copy.outputs[0].dtype = ir.DataType.INT8
            model.graph.insert_after(node, copy)
            reader.replace_input_with(index, copy.outputs[0])


def _split_zero_points(model: ir.Model) -> None:
    """Gives the weights of every linear a zero point of their own.

    Where a processor needs unsigned weights, ONNX Runtime converts weights and zero points linear by linear, and refuses to
    convert a shared one twice.
    """
    for node in list(model.graph):
        codes, zero = (node.inputs[0], node.inputs[2]) if len(node.inputs) == 3 else (None, None)
        if node.op_type != "DequantizeLinear" or codes is None or zero is None or not codes.is_initializer():
            continue
        own = ir.Value(name=f"{codes.name}_zero_point", shape=zero.shape, type=zero.type, const_value=zero.const_value)
        model.graph.register_initializer(own)
        node.replace_input_with(2, own)
