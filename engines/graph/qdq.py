"""Turns planned linears of a float graph into Q/DQ patterns: those that TensorRT runs on integers, and simulations.

W4A16: DequantizeLinear in blocks along K, scale in the graph's float type, straight into the MatMul.
W8A8: one QuantizeLinear with a scale of the float type for each activation, shared by the linears that read it, and
DequantizeLinear with float32 scales and `output_dtype` on both sides: with float16 scales TensorRT would write the raw
integer sum to float16, which overflows for the K of a real decoder.
Every other width is made of the same parts and simulated by ONNX Runtime: 3-bit codes lie in INT4, 6-bit ones in INT8, and
activations of fewer than 8 bits are quantized to INT8 and clipped there to their range.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.graph.int4_packing import pack_nibbles, transposed_nibbles

INT8_BITS = 8


@dataclass(frozen=True)
class FloatLinear:
    """Where a linear stands in the float graph: MatMul(x, Transpose(weight))."""

    name: str
    weight: ir.Value
    transpose: ir.Node
    matmul: ir.Node


def find_linears(model: ir.Model) -> dict[str, FloatLinear]:
    """Every linear of the graph by name (its weight's name without `.weight`)."""
    found = {}
    for node in model.graph:
        if node.op_type != "MatMul" or node.inputs[1] is None:
            continue
        transpose = node.inputs[1].producer()
        if transpose is None or transpose.op_type != "Transpose" or transpose.inputs[0] is None:
            continue
        weight = transpose.inputs[0]
        if weight.is_initializer():
            name = str(weight.name).removesuffix(".weight")
            found[name] = FloatLinear(name, weight, transpose, node)
    return found


def insert_qdq(model: ir.Model, planned: Collection[str], weights: CalibratedCheckpoint, dtype: ir.DataType) -> list[str]:
    """Rewrites the linears named in `planned`, in place; returns their names in graph order.

    Integers are read from `weights` when the graph is written. Raises UserError when a planned linear is not in the graph.
    """
    linears = find_linears(model)
    missing = sorted(set(planned) - set(linears))
    if missing:
        raise UserError(f"{missing[0]}: planned to be quantized, but the graph has no such linear; check the recipe")
    activations: dict[tuple[str, float, int], ir.Value] = {}
    rewritten = [name for name in linears if name in planned]  # in graph order: the first reader of a value makes its Q
    for name in rewritten:
        linear, scheme = linears[name], weights.schemes[name]
        if scheme.group_size is None:
            weight = _int8_weight(model, linear, weights, dtype)
        else:
            weight = _int4_weight(model, linear, scheme.group_size, weights, dtype)
        if (quantizer := weights.input_quantizer(name)) is not None:
            linear.matmul.replace_input_with(0, _activation(model, linear, quantizer, dtype, activations))
        linear.matmul.replace_input_with(1, weight)
        linear.matmul.name = name
        _remove(model, linear)
    return rewritten


def transpose_float_weights(model: ir.Model) -> list[str]:
    """Stores the weights of the linears that stayed float as [in, out], so that no Transpose runs; returns their names."""
    names = []
    for name, linear in find_linears(model).items():
        weight, tensor = linear.weight, linear.weight.const_value
        if tensor is None or weight.dtype is None:
            raise ValueError(f"{name}: fill in the weights first")
        out_features, in_features = tensor.shape.numpy()
        lazy = _lazy((in_features, out_features), weight.dtype, _transposed(tensor))
        linear.matmul.replace_input_with(1, _initializer(model, f"{name}.weight_transposed", lazy))
        linear.matmul.name = name
        _remove(model, linear)
        names.append(name)
    return names


def _transposed(tensor: ir.TensorProtocol) -> Callable[[], ir.TensorProtocol]:
    return lambda: ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype)


def _int4_weight(
    model: ir.Model, linear: FloatLinear, group_size: int, weights: CalibratedCheckpoint, dtype: ir.DataType
) -> ir.Value:
    out_features, in_features = _weight_shape(linear)
    groups, name = in_features // group_size, linear.name

    def codes() -> ir.TensorProtocol:
        stored = weights.packed_nibbles(name)
        if stored is None or out_features % 2:
            packed = pack_nibbles(np.ascontiguousarray(weights.codes(name).T))
        else:
            packed = transposed_nibbles(stored)
        return ir.PackedTensor(packed, ir.DataType.INT4, shape=(in_features, out_features))

    def scale() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(weights.scale(name).T.astype(dtype.numpy())), dtype=dtype)

    inputs = [
        _initializer(model, f"{name}.weight_codes", _lazy((in_features, out_features), ir.DataType.INT4, codes)),
        _initializer(model, f"{name}.weight_scale", _lazy((groups, out_features), dtype, scale)),
    ]
    return _insert(linear.matmul, "DequantizeLinear", inputs, f"{name}.weight_dq", dtype, axis=0, block_size=group_size)


def _int8_weight(model: ir.Model, linear: FloatLinear, weights: CalibratedCheckpoint, dtype: ir.DataType) -> ir.Value:
    out_features, in_features = _weight_shape(linear)
    name = linear.name

    def codes() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(weights.codes(name).T))

    def scale() -> ir.TensorProtocol:
        return ir.Tensor(weights.scale(name).astype(np.float32))

    inputs = [
        _initializer(model, f"{name}.weight_codes", _lazy((in_features, out_features), ir.DataType.INT8, codes)),
        _initializer(model, f"{name}.weight_scale", _lazy((out_features,), ir.DataType.FLOAT, scale)),
        _constant(model, f"zero_point.{out_features}", np.zeros(out_features, np.int8)),
    ]
    return _insert(linear.matmul, "DequantizeLinear", inputs, f"{name}.weight_dq", dtype, axis=1, output_dtype=dtype.value)


def _activation(
    model: ir.Model,
    linear: FloatLinear,
    quantizer: tuple[float, int],
    dtype: ir.DataType,
    shared: dict[tuple[str, float, int], ir.Value],
) -> ir.Value:
    """Q/DQ on the linear's input; linears that read the same value with the same scale and bits share the codes."""
    x, name, (scale, bits) = linear.matmul.inputs[0], linear.name, quantizer
    if x is None:
        raise ValueError(f"{name} has no input")
    key, zero = (str(x.name), scale, bits), _constant(model, "zero_point", np.zeros((), np.int8))
    if key not in shared:
        narrow = np.array(scale, dtype.numpy())
        if float(narrow) != scale:
            raise UserError(f"{name}: its input_scale {scale} is not a {dtype.name} value; calibrate again")
        inputs = [x, _constant(model, f"{name}.input_scale", narrow), zero]
        codes = _insert(linear.matmul, "QuantizeLinear", inputs, f"{name}.input_q", ir.DataType.INT8)
        shared[key] = codes if bits == INT8_BITS else _clipped(model, linear, codes, bits)
    inputs = [shared[key], _constant(model, f"{name}.input_scale_float32", np.array(scale, np.float32)), zero]
    return _insert(linear.matmul, "DequantizeLinear", inputs, f"{name}.input_dq", dtype, output_dtype=dtype.value)


def _clipped(model: ir.Model, linear: FloatLinear, codes: ir.Value, bits: int) -> ir.Value:
    """int8 codes saturated at the range of fewer bits: on integers, where it is exact."""
    bounds = {f"qmin.{bits}": -(2 ** (bits - 1)), f"qmax.{bits}": 2 ** (bits - 1) - 1}
    inputs = [codes, *(_constant(model, name, np.array(bound, np.int8)) for name, bound in bounds.items())]
    return _insert(linear.matmul, "Clip", inputs, f"{linear.name}.input_clip", ir.DataType.INT8)


def _insert(
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


def _lazy(shape: tuple[int, ...], dtype: ir.DataType, make: Callable[[], ir.TensorProtocol]) -> ir.LazyTensor:
    return ir.LazyTensor(make, dtype=dtype, shape=ir.Shape(shape))


def _constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    return _initializer(model, name, ir.tensor(array))


def _initializer(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """The initializer of that name, made when it is not there yet."""
    if name not in model.graph.initializers:
        tensor.name = name
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        model.graph.register_initializer(value)
    return model.graph.initializers[name]


def _remove(model: ir.Model, linear: FloatLinear) -> None:
    model.graph.remove(linear.transpose, safe=True)
    del model.graph.initializers[str(linear.weight.name)]
