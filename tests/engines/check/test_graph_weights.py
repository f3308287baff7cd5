"""Checks of written graphs: exactly the wrong weights are named, and block outputs are taken after the residual."""

from __future__ import annotations

import shutil

import numpy as np
import onnx_ir as ir
import pytest
from damage import double_first, edit_weight, zero
from small_export import PARTS, calibrate, of_part, open_small, schemes_of, write_quantized

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.engines.check.graph_weights import WrongWeight, block_outputs, wrong_weights

DOWN = "language_model.model.layers.0.mlp.down_proj"
FC1 = "vision_tower.vision_model.encoder.layers.1.mlp.fc1"
PLACES = {
    "int4": (DOWN, "language", np.float16),
    "int8": (FC1, "vision", np.float32),
    "sim-w4a4": (FC1, "vision", np.float16),
    "sim-w6a6": (DOWN, "language", np.float32),
    "sim-w3a16": (FC1, "vision", np.float16),
}


@pytest.fixture(scope="module")
def checkpoint(llava):
    return open_small(llava())


@pytest.fixture(scope="module", params=PLACES)
def written(request, checkpoint, tmp_path_factory):
    """(preset, calibrated checkpoint, folder of both graphs)."""
    folder = tmp_path_factory.mktemp("probe")
    calibrated = calibrate(checkpoint, schemes_of(checkpoint, request.param), folder / "calibrated")
    for part in PARTS:
        write_quantized(checkpoint, calibrated, part, ir.DataType.FLOAT16, folder / "graphs")
    return request.param, calibrated, folder / "graphs"


def find_wrong_weights(folder, calibrated):
    """All wrong weights of both graphs."""
    return [
        wrong
        for part in PARTS
        for wrong in wrong_weights(folder / f"{part}.onnx", calibrated, list(of_part(calibrated.schemes, part)))
    ]


@pytest.fixture
def damaged(written, tmp_path):
    """(calibrated checkpoint, folder of a copy of the graphs, a linear, its graph, the type of its weight scale)."""
    preset, calibrated, folder = written
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    linear, part, scale_type = PLACES[preset]
    return calibrated, copy, linear, copy / f"{part}.onnx", scale_type


def test_an_exported_graph_has_no_wrong_weights(written):
    _, calibrated, folder = written
    assert find_wrong_weights(folder, calibrated) == []


def test_one_wrong_scale_is_named(damaged):
    calibrated, folder, linear, graph, scale_type = damaged
    edit_weight(graph, f"{linear}.weight_scale", scale_type, double_first)
    assert find_wrong_weights(folder, calibrated) == [
        WrongWeight(linear, f"1 of {calibrated.scale(linear).size} scales differ")
    ]


def test_zeroed_integers_are_counted(damaged):
    calibrated, folder, linear, graph, _ = damaged
    edit_weight(graph, f"{linear}.weight_codes", np.uint8, zero)
    codes = calibrated.codes(linear)
    assert find_wrong_weights(folder, calibrated) == [
        WrongWeight(linear, f"{np.count_nonzero(codes)} of {codes.size} integers differ")
    ]


def double_constant(graph, name, to):
    """Writes a copy of the graph in which the initializer `name` is doubled."""
    model = ir.load(graph)
    value = model.graph.initializers[name]
    value.const_value = ir.tensor(np.asarray(value.const_value.numpy()) * 2, name=value.name)
    ir.save(model, to, external_data=f"{to.name}.data")


@pytest.mark.parametrize("constant", ["input_scale", "input_scale_float32"])
def test_a_wrong_activation_scale_is_named_for_every_reader(written, tmp_path, constant):
    preset, calibrated, folder = written
    name = f"{FC1.replace('mlp.fc1', 'self_attn.q_proj')}.{constant}"
    if preset == "sim-w3a16":  # this scheme quantizes no activation
        assert name not in ir.load(folder / "vision.onnx").graph.initializers
        return
    double_constant(folder / "vision.onnx", name, tmp_path / "vision.onnx")
    readers = ["q_proj", "k_proj", "v_proj"] if constant == "input_scale" else ["q_proj"]
    wrong = list(wrong_weights(tmp_path / "vision.onnx", calibrated, list(of_part(calibrated.schemes, "vision"))))
    assert sorted(w.linear.rpartition(".")[2] for w in wrong) == sorted(readers)
    assert all("activation scales" in w.what for w in wrong)


def test_codes_of_other_bits_are_named(checkpoint, tmp_path):
    """The bound is shared by all activations of the same number of bits."""
    up = DOWN.replace("down", "up")
    schemes = {DOWN: LinearScheme(4, 4, 128), up: LinearScheme(8, 6, None)}
    calibrated = calibrate(checkpoint, schemes, tmp_path / "calibrated")
    graph = write_quantized(checkpoint, calibrated, "language", ir.DataType.FLOAT16, tmp_path)
    assert list(wrong_weights(graph, calibrated, [DOWN, up])) == []
    double_constant(graph, "qmax.6", tmp_path / "wrong.onnx")
    wrong = list(wrong_weights(tmp_path / "wrong.onnx", calibrated, [DOWN, up]))
    assert wrong == [WrongWeight(up, "activation codes [-32, 62] are not those of 6 bits")]


def test_a_linear_that_stayed_float_is_named(written):
    _, calibrated, folder = written
    (wrong,) = wrong_weights(folder / "language.onnx", calibrated, ["language_model.lm_head"])
    assert wrong == WrongWeight("language_model.lm_head", "is not quantized in the graph")


def test_block_outputs_are_taken_after_the_residual(written, checkpoint):
    _, _, folder = written
    blocks = make_blocks(checkpoint.hf_config)
    all_blocks = blocks.all()
    last_linears = {block.prefix: block.linear_names()[-1] for block in all_blocks}
    readers = {}
    for part in PARTS:
        model = ir.load(folder / f"{part}.onnx")
        for block, value in block_outputs(model, last_linears).items():
            readers[block] = {node.op_type for node, _ in value.uses()}
    assert list(readers) == list(last_linears)
    # The next norm and the next residual read the output of a block, except at the ends of the towers.
    assert [readers[b.prefix] for b in blocks.vision_layers] == [{"LayerNormalization", "Add"}] * 2 + [{"Slice"}]
    assert readers["multi_modal_projector"] == {"Reshape"}
    assert [readers[b.prefix] for b in blocks.text_layers] == [{"RMSNormalization", "Add"}, {"RMSNormalization"}]
