"""Measures the build throughput of TensorRT on this machine: bytes of plan written a second.

Two small engines are built that differ in the number of their weights only; the differences in size and in time give the
rate. It serves the estimate of an export's duration.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qvlm_export.engines.backend import Backend
from qvlm_export.engines.builder.build import BuildJob, build_engines
from qvlm_export.engines.graph.float_graphs import IR_VERSION, OPSET

WIDTH, GROUP = 4096, 128
FEW, MANY = 1, 8  # matrix products with WIDTH x WIDTH weights in each of the two engines
TOKENS = (1, 600, 2048)  # smallest, most likely and largest number of rows


def build_rate(backend: Backend, *, int4: bool) -> float:
    """Returns how many bytes of plan TensorRT writes a second.

    int4: measure W4A16 weights, whose layout TensorRT changes; otherwise float16 weights. Takes a second or two. Raises
    UserError when TensorRT cannot build the engines.
    """
    with tempfile.TemporaryDirectory() as folder:
        jobs = [_write_job(Path(folder), products, int4=int4) for products in (FEW, MANY)]
        few, many = build_engines(backend, jobs, lambda *_: None)
    return (many.plan_bytes - few.plan_bytes) / max(many.seconds - few.seconds, 1e-3)


def _write_job(folder: Path, products: int, *, int4: bool) -> BuildJob:
    """Writes a chain of `products` matrix products as an ONNX file into `folder`; returns the job that builds it."""
    x = _make_value("x", ir.DataType.FLOAT16, ["tokens", WIDTH])
    graph = ir.Graph([x], [], nodes=[], name="rate", opset_imports={"": OPSET})
    generator = np.random.default_rng(0)
    for index in range(products):
        if int4:
            codes = generator.integers(0, 256, WIDTH * WIDTH // 2, dtype=np.uint8)
            scale = np.full((WIDTH // GROUP, WIDTH), 0.01, np.float16)
            packed = ir.PackedTensor(codes, ir.DataType.INT4, shape=(WIDTH, WIDTH))
            weights = [
                _add_initializer(graph, f"codes.{index}", packed),
                _add_initializer(graph, f"scale.{index}", ir.tensor(scale)),
            ]
            weight = _append_node(graph, "DequantizeLinear", weights, axis=0, block_size=GROUP)
        else:
            floats = generator.random((WIDTH, WIDTH), np.float32).astype(np.float16)
            weight = _add_initializer(graph, f"weight.{index}", ir.tensor(floats))
        x = _append_node(graph, "MatMul", [x, weight])
    x.dtype, x.shape = ir.DataType.FLOAT16, ir.Shape(["tokens", WIDTH])
    graph.outputs.append(x)
    path = folder / f"{products}.onnx"
    ir.save(ir.Model(graph, ir_version=IR_VERSION), path, external_data=f"{path.name}.data")
    shapes = tuple((tokens, WIDTH) for tokens in TOKENS)
    return BuildJob(str(path), str(path.with_suffix(".plan")), {"x": (shapes[0], shapes[1], shapes[2])})


def _make_value(name: str, dtype: ir.DataType, shape: list[str | int]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    tensor.name = name
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _append_node(graph: ir.Graph, op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
    node = ir.node(op_type, inputs, attributes=attributes)
    graph.append(node)
    node.outputs[0].name = f"out.{len(graph)}"
    return node.outputs[0]
