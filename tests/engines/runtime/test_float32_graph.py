"""The float32 copy of a graph: it fuses on ONNX Runtime's CPU kernels and computes what a graph written in float32 does."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from small_export import LIMITS, calibrate, of_part, open_small, quantized_graph, schemes_of, write_quantized

from qvlm_export.engines.graph.write import write_graph
from qvlm_export.engines.runtime import onnx_runner
from qvlm_export.engines.runtime.float32_graph import to_float32
from qvlm_export.engines.runtime.onnx_runner import open_float32_session

ORT_WARNINGS_OFF = 3


@pytest.fixture(scope="module")
def checkpoint(llava):
    return open_small(llava())


@pytest.fixture(scope="module", params=[("int4", "vision"), ("int4", "language"), ("int8", "language")], ids="-".join)
def exported(request, checkpoint, tmp_path_factory):
    """(part, the schemes of its linears, the float16 graph, the float32 graph of the same calibrated checkpoint)."""
    preset, part = request.param
    folder = tmp_path_factory.mktemp("float32")
    calibrated = calibrate(checkpoint, schemes_of(checkpoint, preset), folder / "calibrated")
    narrow = write_quantized(checkpoint, calibrated, part, ir.DataType.FLOAT16, folder / "float16")
    model = quantized_graph(checkpoint, calibrated, part, ir.DataType.FLOAT)
    for name in {"rope.cos", "rope.sin"} & set(model.graph.initializers):  # the exported graph has float16 tables
        table = model.graph.initializers[name].const_value.numpy()
        model.graph.initializers[name].const_value = ir.tensor(table.astype(np.float16).astype(np.float32), name=name)
    wide = folder / "float32.onnx"
    write_graph(model, wide, lambda _: None)
    return part, of_part(calibrated.schemes, part), narrow, wide


def open_and_dump(graph, dump, monkeypatch):
    """The session of `open_float32_session`, and the optimized graph that ONNX Runtime made of it."""
    real = ort.SessionOptions

    def options():
        created = real()
        created.optimized_model_filepath = str(dump)
        return created

    with monkeypatch.context() as patched:
        patched.setattr(onnx_runner.ort, "SessionOptions", options)
        session = open_float32_session(graph, graph.with_name(f"{graph.name}.data"), threads=1)
    return session, onnx.load(dump, load_external_data=False)


def open_unfused(graph):
    """A session that runs the graph node by node, as it is written."""
    options = ort.SessionOptions()
    options.log_severity_level = ORT_WARNINGS_OFF
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def feeds(config, part):
    """Inputs of the graph: two images, or two sequences of which the second contains one image."""
    rng = np.random.default_rng(0)
    if part == "vision":
        return {"pixel_values": rng.standard_normal((2, 3, config.vision.image_size, config.vision.image_size), np.float32)}
    text, tokens, length = config.text, config.vision.tokens_per_image, 50
    ids = rng.integers(5, text.vocab_size, (2, length))
    ids[1, 1 : 1 + tokens] = config.image_token_id
    cache = np.zeros((2, text.num_kv_heads, LIMITS.max_length, text.head_dim), np.float32)
    return {
        "input_ids": ids,
        "image_embeds": rng.standard_normal((tokens, text.hidden_size), np.float32),
        "position_ids": np.tile(np.arange(length), (2, 1)),
        "write_index": np.zeros(2, np.int64),
        **{f"past_key_values.{i}.{kind}": cache for i in range(text.num_layers) for kind in ("key", "value")},
    }


def largest_difference(actual, expected):
    """Relative to the largest expected value."""
    return np.abs(actual - expected).max() / np.abs(expected).max()


def test_every_quantized_linear_fuses(exported, tmp_path, monkeypatch):
    part, schemes, narrow, _ = exported
    _, optimized = open_and_dump(narrow, tmp_path / "optimized.onnx", monkeypatch)
    kinds = Counter(node.op_type for node in optimized.graph.node)
    bits = [scheme.weight_bits for scheme in schemes.values()]
    assert kinds["MatMulNBits"] == bits.count(4)
    assert kinds["MatMulIntegerToFloat"] == bits.count(8)
    assert kinds["DequantizeLinear"] == 0
    assert kinds["MatMul"] == (1 if part == "language" else 0)  # lm_head


def test_int4_products_keep_float_activations(exported, tmp_path, monkeypatch):
    _, schemes, narrow, _ = exported
    _, optimized = open_and_dump(narrow, tmp_path / "optimized.onnx", monkeypatch)
    levels = [a.i for node in optimized.graph.node for a in node.attribute if a.name == "accuracy_level"]
    assert levels == [0] * sum(scheme.weight_bits == 4 for scheme in schemes.values())


def test_no_float16_value_is_left(exported):
    part, _, narrow, _ = exported
    model, widened = to_float32(ir.load(narrow))
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(v for node in model.graph for v in node.outputs)]
    assert not [v.name for v in values if v.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)]
    assert {array.dtype for array in widened.values()} == {np.dtype(np.float32)}
    norm = "language_model.model.norm.weight" if part == "language" else "vision_tower.vision_model.pre_layrnorm.weight"
    assert norm in widened
    assert not [name for name in widened if name.endswith(("weight_codes", "zero_point"))]


def test_the_float32_copy_computes_what_a_float32_graph_computes(checkpoint, exported):
    part, _, narrow, wide = exported
    inputs = feeds(checkpoint.config, part)
    outputs = [
        open_float32_session(path, path.with_name(f"{path.name}.data"), threads=1).run(None, inputs)
        for path in (narrow, wide)
    ]
    for output, expected in zip(*outputs, strict=True):
        assert output.dtype == np.float32
        assert np.isfinite(output).all()
        assert largest_difference(output, expected) <= 1e-5


def test_the_float32_copy_computes_what_the_unfused_graph_computes(checkpoint, exported):
    part, schemes, narrow, wide = exported
    inputs = feeds(checkpoint.config, part)
    session = open_float32_session(narrow, narrow.with_name(f"{narrow.name}.data"), threads=1)
    # Where activations are rounded to integers, a difference in rounding is a whole step.
    allowed = 1e-5 if all(scheme.weight_bits == 4 for scheme in schemes.values()) else 0.05
    for output, expected in zip(session.run(None, inputs), open_unfused(wide).run(None, inputs), strict=True):
        assert np.linalg.norm(output - expected) <= allowed * np.linalg.norm(expected)


def test_a_profile_is_written_to_the_requested_path(exported, checkpoint, tmp_path):
    part, _, narrow, _ = exported
    session = open_float32_session(narrow, narrow.with_name(f"{narrow.name}.data"), threads=1, profile=tmp_path / "made")
    session.run(None, feeds(checkpoint.config, part))
    written = Path(session.end_profiling())
    assert (written.parent, written.name.startswith("made")) == (tmp_path, True)
    assert any(event.get("args", {}).get("op_name") == "MatMulNBits" for event in json.loads(written.read_text())) == (
        any(node.op_type == "DequantizeLinear" and "block_size" in node.attributes for node in ir.load(narrow).graph)
    )
