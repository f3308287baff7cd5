"""The float32 twin: it fuses on ONNX Runtime's CPU kernels, and computes what a graph written in float32 computes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from small_export import LIMITS, calibrate, of_part, open_small, plan_of, quantized_graph, write_quantized

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
    """(part, its planned linears, the float16 graph, the float32 graph of the same calibrated checkpoint)."""
    preset, part = request.param
    folder = tmp_path_factory.mktemp("twin")
    calibrated = calibrate(checkpoint, plan_of(checkpoint, preset), folder / "calibrated")
    narrow = write_quantized(checkpoint, calibrated, part, ir.DataType.FLOAT16, folder / "float16")
    model = quantized_graph(checkpoint, calibrated, part, ir.DataType.FLOAT)
    for name in {"rope.cos", "rope.sin"} & set(model.graph.initializers):  # the shipped graph rounds its tables
        table = model.graph.initializers[name].const_value.numpy()
        model.graph.initializers[name].const_value = ir.tensor(table.astype(np.float16).astype(np.float32), name=name)
    wide = folder / "float32.onnx"
    write_graph(model, wide, lambda _: None)
    return part, of_part(calibrated.schemes, part), narrow, wide


def open_and_dump(graph, dump, monkeypatch):
    """The session of open_twin, and the graph that ONNX Runtime made of it."""
    real = ort.SessionOptions

    def options():
        made = real()
        made.optimized_model_filepath = str(dump)
        return made

    with monkeypatch.context() as patched:
        patched.setattr(onnx_runner.ort, "SessionOptions", options)
        session = open_float32_session(graph, graph.with_name(f"{graph.name}.data"), threads=1)
    return session, onnx.load(dump, load_external_data=False)


def open_unfused(graph):
    """The graph as it is written, node by node."""
    options = ort.SessionOptions()
    options.log_severity_level = ORT_WARNINGS_OFF
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def feeds(config, part):
    """Two pictures, or two sequences of unequal content with one picture between them."""
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


def largest_difference(got, wanted):
    """Relative to the largest value that was wanted."""
    return np.abs(got - wanted).max() / np.abs(wanted).max()


def test_every_planned_linear_fuses(exported, tmp_path, monkeypatch):
    part, planned, narrow, _ = exported
    _, optimized = open_and_dump(narrow, tmp_path / "optimized.onnx", monkeypatch)
    kinds = Counter(node.op_type for node in optimized.graph.node)
    bits = [scheme.weight_bits for scheme in planned.values()]
    assert kinds["MatMulNBits"] == bits.count(4)
    assert kinds["MatMulIntegerToFloat"] == bits.count(8)
    assert kinds["DequantizeLinear"] == 0
    assert kinds["MatMul"] == (1 if part == "language" else 0)  # lm_head


def test_int4_products_keep_float_activations(exported, tmp_path, monkeypatch):
    _, planned, narrow, _ = exported
    _, optimized = open_and_dump(narrow, tmp_path / "optimized.onnx", monkeypatch)
    levels = [a.i for node in optimized.graph.node for a in node.attribute if a.name == "accuracy_level"]
    assert levels == [0] * sum(scheme.weight_bits == 4 for scheme in planned.values())


def test_nothing_narrow_is_left(exported):
    part, _, narrow, _ = exported
    model, widened = to_float32(ir.load(narrow))
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(v for node in model.graph for v in node.outputs)]
    assert not [v.name for v in values if v.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)]
    assert {array.dtype for array in widened.values()} == {np.dtype(np.float32)}
    norm = "language_model.model.norm.weight" if part == "language" else "vision_tower.vision_model.pre_layrnorm.weight"
    assert norm in widened
    assert not [name for name in widened if name.endswith(("weight_codes", "zero_point"))]


def test_the_twin_computes_what_a_float32_graph_computes(checkpoint, exported):
    part, _, narrow, wide = exported
    given = feeds(checkpoint.config, part)
    outputs = [
        open_float32_session(path, path.with_name(f"{path.name}.data"), threads=1).run(None, given)
        for path in (narrow, wide)
    ]
    for mine, theirs in zip(*outputs, strict=True):
        assert mine.dtype == np.float32
        assert np.isfinite(mine).all()
        assert largest_difference(mine, theirs) <= 1e-5


def test_the_twin_computes_what_the_unfused_graph_computes(checkpoint, exported):
    part, planned, narrow, wide = exported
    given = feeds(checkpoint.config, part)
    twin = open_float32_session(narrow, narrow.with_name(f"{narrow.name}.data"), threads=1)
    # Where activations are rounded to integers, one rounding that falls the other way is a whole step.
    allowed = 1e-5 if all(scheme.weight_bits == 4 for scheme in planned.values()) else 0.05
    for mine, theirs in zip(twin.run(None, given), open_unfused(wide).run(None, given), strict=True):
        assert np.linalg.norm(mine - theirs) <= allowed * np.linalg.norm(theirs)


def test_a_profile_is_written_where_it_was_asked_for(exported, checkpoint, tmp_path):
    part, _, narrow, _ = exported
    session = open_float32_session(narrow, narrow.with_name(f"{narrow.name}.data"), threads=1, profile=tmp_path / "made")
    session.run(None, feeds(checkpoint.config, part))
    written = Path(session.end_profiling())
    assert (written.parent, written.name.startswith("made")) == (tmp_path, True)
    assert any(event.get("args", {}).get("op_name") == "MatMulNBits" for event in json.loads(written.read_text())) == (
        any(node.op_type == "DequantizeLinear" and "block_size" in node.attributes for node in ir.load(narrow).graph)
    )
