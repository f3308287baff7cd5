"""Turns planned linears of a float graph into the Q/DQ patterns that TensorRT runs on integers.

W4A16: DequantizeLinear in blocks along K, scale in the graph's float type, straight into the MatMul.
W8A8: one QuantizeLinear with a scale of the float type for each activation, shared by the linears that read it, and
DequantizeLinear with float32 scales and `output_dtype` on both sides: with float16 scales TensorRT would write the raw
integer sum to float16, which overflows for the K of a real decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from calibrate.calibrated import CalibratedCheckpoint
from calibrate.errors import UserError
from calibrate.scheme import LinearScheme
from engines.packing import pack_nibbles


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
    activations: dict[tuple[str, float], ir.Value] = {}
    rewritten = [name for name in linears if name in planned]  # in graph order: the first reader of a value makes its Q
    for name in rewritten:
        linear, scheme = linears[name], weights.schemes[name]
        if scheme.weight_bits == 4:
            weight = _int4_weight(model, linear, scheme, weights, dtype)
        else:
            weight = _int8_weight(model, linear, weights, dtype)
            linear.matmul.replace_input_with(0, _int8_activation(model, linear, weights, dtype, activations))
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
    model: ir.Model, linear: FloatLinear, scheme: LinearScheme, weights: CalibratedCheckpoint, dtype: ir.DataType
) -> ir.Value:
    out_features, in_features = _weight_shape(linear)
    groups = in_features // int(scheme.group_size or in_features)
    name = linear.name

    def codes() -> ir.TensorProtocol:
        packed = pack_nibbles(np.ascontiguousarray(weights.codes(name).T))
        return ir.PackedTensor(packed, ir.DataType.INT4, shape=(in_features, out_features))

    def scale() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(weights.scale(name).T.astype(dtype.numpy())), dtype=dtype)

    inputs = [
        _initializer(model, f"{name}.weight_codes", _lazy((in_features, out_features), ir.DataType.INT4, codes)),
        _initializer(model, f"{name}.weight_scale", _lazy((groups, out_features), dtype, scale)),
    ]
    return _insert(
        linear.matmul, "DequantizeLinear", inputs, f"{name}.weight_dq", dtype, axis=0, block_size=scheme.group_size
    )


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


def _int8_activation(
    model: ir.Model,
    linear: FloatLinear,
    weights: CalibratedCheckpoint,
    dtype: ir.DataType,
    shared: dict[tuple[str, float], ir.Value],
) -> ir.Value:
    """Q/DQ on the linear's input; linears that read the same value with the same scale share the Q."""
    x = linear.matmul.inputs[0]
    scale = weights.input_scale(linear.name)
    if x is None or scale is None:
        raise UserError(f"{linear.name}: the calibrated checkpoint has no input_scale for it; calibrate again")
    key, name, zero = (str(x.name), scale), linear.name, _constant(model, "zero_point", np.zeros((), np.int8))
    if key not in shared:
        narrow = np.array(scale, dtype.numpy())
        if float(narrow) != scale:
            raise UserError(f"{name}: its input_scale {scale} is not a {dtype.name} value; calibrate again")
        inputs = [x, _constant(model, f"{name}.input_scale", narrow), zero]
        shared[key] = _insert(linear.matmul, "QuantizeLinear", inputs, f"{name}.input_q", ir.DataType.INT8)
    inputs = [shared[key], _constant(model, f"{name}.input_scale_float32", np.array(scale, np.float32)), zero]
    return _insert(linear.matmul, "DequantizeLinear", inputs, f"{name}.input_dq", dtype, output_dtype=dtype.value)


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
