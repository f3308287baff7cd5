"""How fast TensorRT turns weights into a plan on this machine, by building two small engines. For estimates."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qvlm_export.engines.backend import Backend
from qvlm_export.engines.builder.build import BuildJob, build_engines
from qvlm_export.engines.graph.float_graphs import IR_VERSION, OPSET

WIDTH, GROUP = 4096, 128
FEW, MANY = 1, 8  # products of WIDTH x WIDTH weights in the two engines, whose difference is weights alone
TOKENS = (1, 600, 2048)


def build_rate(backend: Backend, *, int4: bool) -> float:
    """Bytes of plan a second. int4: of W4A16 weights, which are laid out anew; else of float16 ones.

    Takes a second or two. Raises UserError when TensorRT cannot build the engines.
    """
    with tempfile.TemporaryDirectory() as folder:
        jobs = [_job(Path(folder), products, int4=int4) for products in (FEW, MANY)]
        few, many = build_engines(backend, jobs, lambda *_: None)
    return (many.plan_bytes - few.plan_bytes) / max(many.seconds - few.seconds, 1e-3)


def _job(folder: Path, products: int, *, int4: bool) -> BuildJob:
    """Writes a graph of products one behind another."""
    x = _value("x", ir.DataType.FLOAT16, ["tokens", WIDTH])
    graph = ir.Graph([x], [], nodes=[], name="rate", opset_imports={"": OPSET})
    generator = np.random.default_rng(0)
    for number in range(products):
        if int4:
            codes = generator.integers(0, 256, WIDTH * WIDTH // 2, dtype=np.uint8)
            scale = np.full((WIDTH // GROUP, WIDTH), 0.01, np.float16)
            packed = ir.PackedTensor(codes, ir.DataType.INT4, shape=(WIDTH, WIDTH))
            weights = [
                _initializer(graph, f"codes.{number}", packed),
                _initializer(graph, f"scale.{number}", ir.tensor(scale)),
            ]
            weight = _appended(graph, "DequantizeLinear", weights, axis=0, block_size=GROUP)
        else:
            floats = generator.random((WIDTH, WIDTH), np.float32).astype(np.float16)
            weight = _initializer(graph, f"weight.{number}", ir.tensor(floats))
        x = _appended(graph, "MatMul", [x, weight])
    x.dtype, x.shape = ir.DataType.FLOAT16, ir.Shape(["tokens", WIDTH])
    graph.outputs.append(x)
    path = folder / f"{products}.onnx"
    ir.save(ir.Model(graph, ir_version=IR_VERSION), path, external_data=f"{path.name}.data")
    shapes = tuple((tokens, WIDTH) for tokens in TOKENS)
    return BuildJob(str(path), str(path.with_suffix(".plan")), {"x": (shapes[0], shapes[1], shapes[2])})


def _value(name: str, dtype: ir.DataType, shape: list[str | int]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    tensor.name = name
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _appended(graph: ir.Graph, op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
    node = ir.node(op_type, inputs, attributes=attributes)
    graph.append(node)
    node.outputs[0].name = f"out.{len(graph)}"
    return node.outputs[0]
