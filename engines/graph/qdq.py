"""Q/DQ passes: QuantizeLinear and DequantizeLinear around the quantized linears, transposed weights for the float ones.

`insert_qdq` rewrites a float graph in place to patterns that TensorRT runs on integers:

W4A16: DequantizeLinear in blocks along K, with scales in the graph's float type, directly into the MatMul.
W8A8: one QuantizeLinear for each activation, shared by the linears that read it, with a scale in the graph's float type;
then DequantizeLinear with float32 scales and `output_dtype` on both sides. With float16 scales TensorRT would write the raw
integer sum to float16, which overflows for the K of a real decoder.

Every other scheme is made of the same nodes and simulated by ONNX Runtime: 3-bit codes are stored as INT4, 6-bit codes as
INT8, and activations of fewer than 8 bits are quantized to INT8 and clipped to their range.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.graph.int4_packing import pack_nibbles, transpose_nibbles

INT8_BITS = 8


@dataclass(frozen=True)
class FloatLinear:
    """A linear of the float graph, MatMul(x, Transpose(weight)). name: that of its weight without `.weight`."""

    name: str
    weight: ir.Value
    transpose: ir.Node
    matmul: ir.Node


def find_linears(model: ir.Model) -> dict[str, FloatLinear]:
    """Returns name -> linear for every linear of the graph, in graph order."""
    linears = {}
    for node in model.graph:
        if node.op_type != "MatMul" or node.inputs[1] is None:
            continue
        transpose = node.inputs[1].producer()
        if transpose is None or transpose.op_type != "Transpose" or transpose.inputs[0] is None:
            continue
        weight = transpose.inputs[0]
        if weight.is_initializer():
            name = str(weight.name).removesuffix(".weight")
            linears[name] = FloatLinear(name, weight, transpose, node)
    return linears


def insert_qdq(model: ir.Model, quantized: Collection[str], weights: CalibratedCheckpoint, dtype: ir.DataType) -> list[str]:
    """Pass: rewrites the linears named in `quantized` to Q/DQ patterns, in place; returns their names in graph order.

    weights: the calibrated checkpoint; its integers are read when the graph is written. dtype: the graph's float type.
    Raises UserError when a linear is not in the graph, or when `dtype` cannot hold an input scale exactly.
    """
    linears = find_linears(model)
    missing = sorted(set(quantized) - set(linears))
    if missing:
        raise UserError(f"{missing[0]}: should be quantized, but the graph has no such linear; check the recipe")
    activations: dict[tuple[str, float, int], ir.Value] = {}
    # In graph order, because the first reader of a value inserts its QuantizeLinear.
    rewritten = [name for name in linears if name in quantized]
    for name in rewritten:
        linear, scheme = linears[name], weights.schemes[name]
        if scheme.group_size is None:
            weight = _insert_int8_weight(model, linear, weights, dtype)
        else:
            weight = _insert_int4_weight(model, linear, scheme.group_size, weights, dtype)
        if (quantizer := weights.input_quantizer(name)) is not None:
            linear.matmul.replace_input_with(0, _insert_activation_qdq(model, linear, quantizer, dtype, activations))
        linear.matmul.replace_input_with(1, weight)
        linear.matmul.name = name
        _remove_float_weight(model, linear)
    return rewritten


def transpose_float_weights(model: ir.Model) -> list[str]:
    """Pass: stores the weights of all float linears as [in, out], so that no Transpose is executed; returns their names.

    A weight with another reader, the embedding table of a tied head, stays as it is, or it would be stored twice. Raises
    ValueError when the weights have not been filled in.
    """
    names = []
    for name, linear in find_linears(model).items():
        weight, tensor = linear.weight, linear.weight.const_value
        if len(weight.uses()) > 1:
            continue
        if tensor is None or weight.dtype is None:
            raise ValueError(f"{name}: fill in the weights first")
        out_features, in_features = tensor.shape.numpy()
        transposed = _make_lazy((in_features, out_features), weight.dtype, _make_transposed(tensor))
        linear.matmul.replace_input_with(1, _add_initializer(model, f"{name}.weight_transposed", transposed))
        linear.matmul.name = name
        _remove_float_weight(model, linear)
        names.append(name)
    return names


def _make_transposed(tensor: ir.TensorProtocol) -> Callable[[], ir.TensorProtocol]:
    return lambda: ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype)


def _insert_int4_weight(
    model: ir.Model, linear: FloatLinear, group_size: int, weights: CalibratedCheckpoint, dtype: ir.DataType
) -> ir.Value:
    """Inserts the DequantizeLinear of a weight in groups; returns the float weight [in, out]."""
    out_features, in_features = _weight_shape(linear)
    groups, name = in_features // group_size, linear.name

    def codes() -> ir.TensorProtocol:
        stored = weights.packed_nibbles(name)
        if stored is None or out_features % 2:
            packed = pack_nibbles(np.ascontiguousarray(weights.codes(name).T))
        else:
            packed = transpose_nibbles(stored)
        return ir.PackedTensor(packed, ir.DataType.INT4, shape=(in_features, out_features))

    def scale() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(weights.scale(name).T.astype(dtype.numpy())), dtype=dtype)

    inputs = [
        _add_initializer(model, f"{name}.weight_codes", _make_lazy((in_features, out_features), ir.DataType.INT4, codes)),
        _add_initializer(model, f"{name}.weight_scale", _make_lazy((groups, out_features), dtype, scale)),
    ]
    return _add_node(linear.matmul, "DequantizeLinear", inputs, f"{name}.weight_dq", dtype, axis=0, block_size=group_size)


def _insert_int8_weight(model: ir.Model, linear: FloatLinear, weights: CalibratedCheckpoint, dtype: ir.DataType) -> ir.Value:
    """Inserts the DequantizeLinear of a weight with one scale per output; returns the float weight [in, out]."""
    out_features, in_features = _weight_shape(linear)
    name = linear.name

    def codes() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(weights.codes(name).T))

    def scale() -> ir.TensorProtocol:
        return ir.Tensor(weights.scale(name).astype(np.float32))

    inputs = [
        _add_initializer(model, f"{name}.weight_codes", _make_lazy((in_features, out_features), ir.DataType.INT8, codes)),
        _add_initializer(model, f"{name}.weight_scale", _make_lazy((out_features,), ir.DataType.FLOAT, scale)),
        _add_constant(model, f"zero_point.{out_features}", np.zeros(out_features, np.int8)),
    ]
    return _add_node(linear.matmul, "DequantizeLinear", inputs, f"{name}.weight_dq", dtype, axis=1, output_dtype=dtype.value)


def _insert_activation_qdq(
    model: ir.Model,
    linear: FloatLinear,
    quantizer: tuple[float, int],
    dtype: ir.DataType,
    shared: dict[tuple[str, float, int], ir.Value],
) -> ir.Value:
    """Inserts Q/DQ at the linear's input and returns the dequantized value.

    Linears that read the same value with the same scale and bits share the codes. quantizer: scale and bits. shared: (value
    name, scale, bits) -> codes, to which new codes are added.
    """
    x, name, (scale, bits) = linear.matmul.inputs[0], linear.name, quantizer
    if x is None:
        raise ValueError(f"{name} has no input")
    key, zero_point = (str(x.name), scale, bits), _add_constant(model, "zero_point", np.zeros((), np.int8))
    if key not in shared:
        typed_scale = np.array(scale, dtype.numpy())
        if float(typed_scale) != scale:
            raise UserError(f"{name}: its input_scale {scale} is not a {dtype.name} value; calibrate again")
        inputs = [x, _add_constant(model, f"{name}.input_scale", typed_scale), zero_point]
        codes = _add_node(linear.matmul, "QuantizeLinear", inputs, f"{name}.input_q", ir.DataType.INT8)
        shared[key] = codes if bits == INT8_BITS else _insert_clip(model, linear, codes, bits)
    inputs = [shared[key], _add_constant(model, f"{name}.input_scale_float32", np.array(scale, np.float32)), zero_point]
    return _add_node(linear.matmul, "DequantizeLinear", inputs, f"{name}.input_dq", dtype, output_dtype=dtype.value)


def _insert_clip(model: ir.Model, linear: FloatLinear, codes: ir.Value, bits: int) -> ir.Value:
    """Inserts a Clip of int8 codes to the range of `bits` bits; returns the clipped codes. On integers this is exact."""
    bounds = {f"qmin.{bits}": -(2 ** (bits - 1)), f"qmax.{bits}": 2 ** (bits - 1) - 1}
    inputs = [codes, *(_add_constant(model, name, np.array(bound, np.int8)) for name, bound in bounds.items())]
    return _add_node(linear.matmul, "Clip", inputs, f"{linear.name}.input_clip", ir.DataType.INT8)


def _add_node(
    before: ir.Node, op_type: str, inputs: list[ir.Value], name: str, dtype: ir.DataType, **attributes: int | None
) -> ir.Value:
    node = ir.node(op_type, inputs, attributes=attributes, name=name)
    node.outputs[0].name = f"{name}.out"
    node.outputs[0].dtype = dtype
    if before.graph is None:
        raise ValueError(f"{before.name} is not in a graph")
    before.graph.insert_before(before, node)
    return node.outputs[0]


def _weight_shape(linear: FloatLinear) -> tuple[int, int]:
    if linear.weight.shape is None:
        raise ValueError(f"{linear.name} has no shape")
    out_features, in_features = linear.weight.shape.numpy()
    return out_features, in_features


def _make_lazy(shape: tuple[int, ...], dtype: ir.DataType, make: Callable[[], ir.TensorProtocol]) -> ir.LazyTensor:
    return ir.LazyTensor(make, dtype=dtype, shape=ir.Shape(shape))


def _add_constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    return _add_initializer(model, name, ir.tensor(array))


def _add_initializer(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Returns the initializer `name`, which is added with the data of `tensor` if the graph does not have it."""
    if name not in model.graph.initializers:
        tensor.name = name
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        model.graph.register_initializer(value)
    return model.graph.initializers[name]


def _remove_float_weight(model: ir.Model, linear: FloatLinear) -> None:
    model.graph.remove(linear.transpose, safe=True)
    del model.graph.initializers[str(linear.weight.name)]
