"""Graphs of one linear or one attention, in forms that TensorRT fuses and in forms that it does not, for tests of builds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qvlm_export.engines.backend import choose_backend
from qvlm_export.engines.builder.build import BuildJob, BuildReport, Profile, build_engines

HALF = TensorProto.FLOAT16
INPUTS, OUTPUTS = 256, 512
LINEAR = "block.linear"
PROFILE: Profile = {"x": ((1, INPUTS), (4, INPUTS), (8, INPUTS))}


def tensor(name: str, dtype: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    """Declaration of a graph input or output."""
    return helper.make_tensor_value_info(name, dtype, shape)


def make_model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray | onnx.TensorProto],
) -> onnx.ModelProto:
    """A checked ONNX model. weights: arrays, or ONNX tensors of types that numpy does not have."""
    initializers = [
        w if isinstance(w, onnx.TensorProto) else numpy_helper.from_array(w, name) for name, w in weights.items()
    ]
    graph = helper.make_graph(nodes, "small", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=12)
    onnx.checker.check_model(model, full_check=True)
    return model


def linear_model(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray | onnx.TensorProto]) -> onnx.ModelProto:
    """A model that maps x [rows, INPUTS] to y [rows, OUTPUTS], both float16."""
    return make_model(nodes, [tensor("x", HALF, ["rows", INPUTS])], [tensor("y", HALF, ["rows", OUTPUTS])], weights)


def int4_model(block_size: int | None) -> onnx.ModelProto:
    """A linear named LINEAR with INT4 weights: a scale per block of inputs, or per output channel if block_size is None."""
    codes = np.random.default_rng(0).integers(-7, 8, (INPUTS, OUTPUTS))
    if block_size is None:
        scale, attributes = np.full(OUTPUTS, 0.01, np.float16), {"axis": 1}
    else:
        scale = np.full((INPUTS // block_size, OUTPUTS), 0.01, np.float16)
        attributes = {"axis": 0, "block_size": block_size}
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"], name=f"{LINEAR}.weight_dq", **attributes),
        helper.make_node("MatMul", ["x", "w"], ["y"], name=LINEAR),
    ]
    packed = helper.make_tensor("codes", TensorProto.INT4, codes.shape, codes.reshape(-1).tolist())
    return linear_model(nodes, {"codes": packed, "scale": scale})


def int8_model(*, activation_scales: int = 1, dequantize_type: type = np.float32) -> onnx.ModelProto:
    """A linear named LINEAR with INT8 weights and activations. activation_scales: 1, or one for each of the INPUTS."""
    shape, axis = ((), {}) if activation_scales == 1 else ((activation_scales,), {"axis": 1})
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"], **axis),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale_dq", "x_zero"], ["x_dq"], output_dtype=HALF, **axis),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["w"], axis=1, output_dtype=HALF),
        helper.make_node("MatMul", ["x_dq", "w"], ["y"], name=LINEAR),
    ]
    weights = {
        "x_scale": np.full(shape, 0.05, np.float16),
        "x_scale_dq": np.full(shape, np.float16(0.05), dequantize_type),
        "x_zero": np.zeros(shape, np.int8),
        "codes": np.random.default_rng(0).integers(-127, 128, (INPUTS, OUTPUTS)).astype(np.int8),
        "scale": np.full(OUTPUTS, 0.01, dequantize_type),
        "zero": np.zeros(OUTPUTS, np.int8),
    }
    return linear_model(nodes, weights)


def attention_model(*, with_lengths: bool) -> tuple[onnx.ModelProto, Profile]:
    """A model of one Attention node and its profile; with_lengths adds the nonpad_kv_seqlen that TensorRT ignores."""
    inputs = [tensor(name, HALF, ["batch", 4, rows, 64]) for name, rows in (("q", "rows"), ("k", 32), ("v", 32))]
    inputs.append(tensor("mask", HALF, ["batch", 1, "rows", 32]))
    names = ["q", "k", "v", "mask"]
    cache = ((1, 4, 32, 64), (1, 4, 32, 64), (2, 4, 32, 64))
    profile = {"q": ((1, 4, 1, 64), (1, 4, 4, 64), (2, 4, 8, 64)), "k": cache, "v": cache}
    profile["mask"] = ((1, 1, 1, 32), (1, 1, 4, 32), (2, 1, 8, 32))
    if with_lengths:
        inputs.append(tensor("lengths", TensorProto.INT64, ["batch"]))
        names += ["", "", "lengths"]
        profile["lengths"] = ((1,), (1,), (2,))
    node = helper.make_node("Attention", names, ["y"], name="attend")
    return make_model([node], inputs, [tensor("y", HALF, ["batch", 4, "rows", 64])], {}), profile


def build(
    model: onnx.ModelProto | bytes, folder: Path, profile: Profile = PROFILE, target: str = "sm89", name: str = "small"
) -> BuildReport:
    """Builds `folder / name.plan` from the model with TensorRT-RTX; returns the report of the build."""
    path = folder / f"{name}.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    job = BuildJob(str(path), str(folder / f"{name}.plan"), profile)
    return build_engines(choose_backend("tensorrt-rtx", (target,)), [job], lambda *_: None)[0]
