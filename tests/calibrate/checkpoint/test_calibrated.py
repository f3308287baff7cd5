"""The calibrated checkpoint: round trips are bit-exact, incomplete folders are refused, and transformers loads it."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from commands import PICTURE, export_to, write_calibration
from compressed_tensors.compressors import decompress_module
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_export import briefly_full, calibrate, module_of, open_small, schemes_of
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from qvlm_export.calibrate.calibrators.rtn import calibrate_rtn
from qvlm_export.calibrate.checkpoint.calibrated import (
    CalibratedCheckpoint,
    CalibratedWriter,
    QuantizedLinear,
    quantization_config,
)
from qvlm_export.calibrate.checkpoint.scheme import ACTIVATION_BITS, GROUPED_BITS, W8A8, WEIGHT_BITS, LinearScheme
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.chat_templates import chat_text

W4A16 = LinearScheme(weight_bits=4, activation_bits=None, group_size=64)
W3A16, W3A8, W6A6, W8A16 = (
    LinearScheme(3, None, 64),
    LinearScheme(3, 8, 64),
    LinearScheme(6, 6, None),
    LinearScheme(8, None, None),
)
SUMMARY = {"method": "by hand"}


def random_linear(scheme, seed=0, shape=(6, 128)):
    rng = np.random.default_rng(seed)
    codes = rng.integers(scheme.qmin, scheme.qmax + 1, shape).astype(np.int8)
    dtype = np.float16 if scheme.group_size else np.float32
    scale = rng.uniform(0.001, 0.1, scheme.scale_shape(shape)).astype(dtype)
    return QuantizedLinear(scheme, codes, scale, None if scheme.activation_bits is None else 0.0625)


def write_by_hand(folder, linears, floats=None):
    writer = CalibratedWriter(folder)
    for number, (name, linear) in enumerate(linears.items()):
        writer.write_shard(f"block.{number}", {name: linear}, {})
    writer.write_shard("rest", {}, floats or {})
    writer.finish({"model_type": "llava"}, SUMMARY)
    return folder


def assert_equal(actual, expected):
    assert actual.scheme == expected.scheme
    assert actual.input_scale == expected.input_scale
    for array, expected_array in ((actual.codes, expected.codes), (actual.scale, expected.scale)):
        assert array.dtype == expected_array.dtype
        np.testing.assert_array_equal(array, expected_array)


@pytest.mark.parametrize(
    "linears",
    [
        {"a.b": random_linear(W4A16)},
        {"a.b": random_linear(W8A8)},
        {"a.b": random_linear(W4A16, 1), "a.c": random_linear(W8A8, 2), "d": random_linear(W4A16, 3, (2, 192))},
        {"a.b": random_linear(W3A16, 1, (3, 192)), "a.c": random_linear(W3A8, 2)},
        {"a.b": random_linear(W6A6, 1, (3, 77)), "a.c": random_linear(W8A16, 2), "d": random_linear(W3A8, 3)},
    ],
    ids=["W4A16", "W8A8", "mixed", "three bits", "simulated"],
)
def test_linears_and_float_tensors_are_read_back_bit_equal(tmp_path, linears):
    floats = {"a.norm.weight": np.arange(5, dtype=np.float16), "a.b.bias": np.arange(6, dtype=np.float32)}
    checkpoint = CalibratedCheckpoint(write_by_hand(tmp_path, linears, floats))
    assert set(checkpoint.schemes) == set(linears)
    assert checkpoint.summary == SUMMARY
    for name, linear in linears.items():
        assert_equal(checkpoint.linear(name), linear)
        np.testing.assert_array_equal(checkpoint.linear(name).dequantized(), linear.dequantized())
    for name, array in floats.items():
        assert checkpoint.floats.dtype(name) == array.dtype
        np.testing.assert_array_equal(checkpoint.floats.load(name), array)


def test_dequantized_multiplies_each_group_by_its_own_scale():
    codes = np.array([[1] * 64 + [2] * 64, [-8] * 64 + [7] * 64], np.int8)
    scale = np.array([[0.5, 0.25], [1.0, 2.0]], np.float16)
    weight = QuantizedLinear(W4A16, codes, scale, None).dequantized()
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight[:, [0, 63, 64, 127]], [[0.5, 0.5, 0.5, 0.5], [-8, -8, 14, 14]])


def test_a_folder_without_index_is_refused(tmp_path):
    folder = write_by_hand(tmp_path, {"a.b": random_linear(W8A8)})
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=re.escape(str(folder))):
        CalibratedCheckpoint(folder)


@pytest.mark.parametrize("files_written", range(6))
def test_a_kill_before_the_last_file_leaves_a_folder_that_is_refused(tmp_path, monkeypatch, files_written):
    real_replace, finished = os.replace, []

    def replace(temporary, path):
        if len(finished) == files_written:
            raise KeyboardInterrupt
        finished.append(path.name)
        real_replace(temporary, path)

    linears = {"a.b": random_linear(W8A8), "a.c": random_linear(W4A16)}  # two shards, one of floats, three JSON files
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write_by_hand(tmp_path, linears, {"n": np.ones(3)})
    monkeypatch.undo()
    assert not (tmp_path / "model.safetensors.index.json").exists()
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        CalibratedCheckpoint(tmp_path)
    write_by_hand(tmp_path, linears, {"n": np.ones(3)})
    assert_equal(CalibratedCheckpoint(tmp_path).linear("a.b"), linears["a.b"])


def test_a_new_writer_deletes_the_index_of_an_earlier_run(tmp_path):
    folder = write_by_hand(tmp_path, {"a.b": random_linear(W8A8)})
    CalibratedWriter(folder).write_shard("block.0", {"a.b": random_linear(W8A8, seed=1)}, {})
    with pytest.raises(UserError, match=re.escape(str(folder))):
        CalibratedCheckpoint(folder)


def test_no_temporary_file_is_left(tmp_path):
    folder = write_by_hand(tmp_path, {"a.b": random_linear(W8A8)})
    assert sorted(path.name for path in folder.iterdir()) == [
        "calibration.json",
        "config.json",
        "model-block.0.safetensors",
        "model-rest.safetensors",
        "model.safetensors.index.json",
    ]


def test_another_record_version_is_refused(tmp_path):
    folder = write_by_hand(tmp_path, {"a.b": random_linear(W8A8)})
    record = json.loads((folder / "calibration.json").read_text())
    (folder / "calibration.json").write_text(json.dumps({**record, "version": 2}))
    with pytest.raises(UserError, match=r"calibration.json: record version 2, this program reads 1; calibrate again"):
        CalibratedCheckpoint(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"7",
        b'{"version": 1}',
        b'{"version": 1, "summary": {}, "linears": {"a.b": {"bits": 8}}}',
        b'{"version": 1, "summary": {}, "linears": {"a.b": 8}}',
        b'{"version": 1, "summary": {}, "linears": [1]}',
        b'{"version": 1, "summary": {}, "linears": {"a.b": {"weight_bits": 5, "activation_bits": 8, "group_size": null}}}',
    ],
)
def test_a_damaged_record_is_refused_with_its_path(tmp_path, content):
    folder = write_by_hand(tmp_path, {"a.b": random_linear(W8A8)})
    (folder / "calibration.json").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(folder / "calibration.json"))) as caught:
        CalibratedCheckpoint(folder)
    assert "calibrate again" in str(caught.value)


def test_a_missing_record_is_refused_with_its_path(tmp_path):
    folder = write_by_hand(tmp_path, {"a.b": random_linear(W8A8)})
    (folder / "calibration.json").unlink()
    with pytest.raises(UserError, match=re.escape(str(folder / "calibration.json"))):
        CalibratedCheckpoint(folder)


NAMINGS = {
    "language_model.model.layers.1.self_attn.q_proj": [
        "language_model.model.layers.{}.self_attn.q_proj",
        "model.language_model.layers.{}.self_attn.q_proj",
    ],
    "vision_tower.vision_model.encoder.layers.1.mlp.fc1": [
        "vision_tower.vision_model.encoder.layers.{}.mlp.fc1",
        "model.vision_tower.encoder.layers.{}.mlp.fc1",
        "model.vision_tower.vision_model.encoder.layers.{}.mlp.fc1",
    ],
}


@pytest.mark.parametrize(("name", "spellings"), NAMINGS.items())
def test_a_target_matches_its_linear_in_every_naming_and_no_other(name, spellings):
    (target,) = quantization_config({name: W8A8})["config_groups"]["group_0"]["targets"]
    pattern = re.compile(target.removeprefix("re:"))
    for spelling in spellings:
        assert pattern.match(spelling.format(1))
        for other in (0, 10, 11, "1x", "x1"):
            assert not pattern.match(spelling.format(other))
        assert not pattern.match(spelling.format(1) + ".weight")
        assert not pattern.match("other." + spelling.format(1))
        assert not pattern.match(spelling.format(1).replace(".q_proj", ".k_proj").replace(".fc1", ".fc2"))


def test_the_projector_is_matched_with_and_without_the_prefix_model():
    (target,) = quantization_config({"multi_modal_projector.linear_1": W8A8})["config_groups"]["group_0"]["targets"]
    pattern = re.compile(target.removeprefix("re:"))
    assert pattern.match("multi_modal_projector.linear_1")
    assert pattern.match("model.multi_modal_projector.linear_1")
    assert not pattern.match("model.multi_modal_projector.linear_10")


def test_there_is_one_config_group_for_each_scheme():
    groups_of_128 = LinearScheme(weight_bits=4, activation_bits=None, group_size=128)
    expected_inputs = [{"num_bits": 6}, {"num_bits": 8}, None]
    config = quantization_config({"language_model.x": W6A6, "language_model.y": W3A8, "language_model.z": W8A16})
    groups = sorted(config["config_groups"].values(), key=lambda g: g["targets"])
    assert [(g["format"], g["weights"]["num_bits"]) for g in groups] == [
        ("int-quantized", 6),
        ("pack-quantized", 3),
        ("int-quantized", 8),
    ]
    for group, inputs in zip(groups, expected_inputs, strict=True):
        common = {"type": "int", "symmetric": True, "dynamic": False, "strategy": "tensor"}
        assert group["input_activations"] == (inputs and {**common, **inputs})
    config = quantization_config(
        {"language_model.x": W8A8, "language_model.y": W4A16, "language_model.z": groups_of_128, "language_model.w": W4A16}
    )
    groups = config["config_groups"].values()
    assert config["format"] == "mixed-precision"
    assert [(g["format"], g["weights"].get("group_size"), len(g["targets"])) for g in groups] == [
        ("pack-quantized", 64, 2),
        ("pack-quantized", 128, 1),
        ("int-quantized", None, 1),
    ]
    assert quantization_config({"language_model.y": W4A16, "language_model.z": groups_of_128})["format"] == "pack-quantized"


def test_linears_of_tower_and_projector_are_a_dense_group_of_their_own():
    names = ("language_model.x", "vision_tower.y", "multi_modal_projector.linear_1")
    groups = quantization_config(dict.fromkeys(names, W8A8))["config_groups"].values()
    assert [(group["format"], len(group["targets"])) for group in groups] == [("int-quantized", 1), ("dense", 2)]


def every_scheme(checkpoint):
    """Schemes of all linears, which cycle through all bits of weights and activations, with groups of 128 and of 64."""
    schemes = [
        LinearScheme(weight, activation, group)
        for weight in WEIGHT_BITS
        for activation in ACTIVATION_BITS
        for group in ((128, 64) if weight <= GROUPED_BITS else (None,))
    ]
    names = schemes_of(checkpoint, "int8")
    assert len(names) >= len(schemes)
    return dict(zip(names, itertools.cycle(schemes), strict=False))


@pytest.fixture(
    scope="module", params=["int4", "int8", "sim-w6a6", "sim-w4a4", "sim-w4a8", "sim-w3a16", "every scheme", "int8 full"]
)
def loaded(request, llava, tmp_path_factory):
    """A calibrated checkpoint, the model that transformers loads from it, and the loading info."""
    checkpoint = open_small(llava())
    folder = tmp_path_factory.mktemp("calibrated")
    preset = request.param.removesuffix(" full")
    schemes = every_scheme(checkpoint) if preset == "every scheme" else schemes_of(checkpoint, preset)
    calibrator = calibrate_rtn if preset == request.param else briefly_full
    calibrated = calibrate(checkpoint, schemes, folder, calibrator=calibrator)
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return calibrated, model, info


def test_transformers_finds_every_tensor_and_no_other(loaded):
    _, _, info = loaded
    assert {key: set(names) for key, names in info.items() if key != "error_msgs"} == {
        "missing_keys": set(),
        "unexpected_keys": set(),
        "mismatched_keys": set(),
    }
    assert list(info["error_msgs"]) == []


def test_transformers_decompresses_the_same_weights_and_input_scales(loaded):
    calibrated, model, _ = loaded
    quantized = {id(module_of(model, name)): name for name in calibrated.schemes}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert hasattr(module, "quantization_scheme") == (id(module) in quantized)
    for name in calibrated.schemes:
        module = module_of(model, name)
        linear = calibrated.linear(name)
        inputs = module.quantization_scheme.input_activations
        assert (inputs and inputs.num_bits) == linear.scheme.activation_bits
        assert module.quantization_scheme.weights.num_bits == linear.scheme.weight_bits
        if linear.input_scale is not None:
            assert module.input_scale.tolist() == [linear.input_scale]
        decompress_module(module)
        np.testing.assert_array_equal(module.weight.detach().numpy(), linear.dequantized())


def test_every_stored_tensor_is_in_the_index(loaded):
    calibrated, _, _ = loaded
    index = json.loads((calibrated.folder / "model.safetensors.index.json").read_text())["weight_map"]
    stored = {}
    for path in calibrated.folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            stored |= dict.fromkeys(file.keys(), path.name)
    assert index == stored


def answer_of(folder, forward_first):
    """Token ids that transformers generates from a folder, which holds its processor, too."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    text = chat_text(processor, [{"role": "user", "text": "What color is the ring?", "images": 1}])
    inputs = processor(images=[Image.open(PICTURE)], text=[text], return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    if forward_first:
        model(**inputs)
    return model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()


@pytest.mark.parametrize("scheme", ["int4", "int8", "sim-w3a16"])
def test_generate_may_be_the_first_call(llava, tmp_path, scheme):
    export_to(llava(), tmp_path / "x.plan", "--backend", "onnx", "--scheme", scheme, "--calib-data",
              write_calibration(tmp_path))  # fmt: skip
    folder = tmp_path / "x.calibrated"
    assert answer_of(folder, forward_first=False) == answer_of(folder, forward_first=True)


def test_int8_weights_of_a_tower_written_before_are_still_read(llava, tmp_path):
    checkpoint = open_small(llava())
    calibrated = calibrate(checkpoint, schemes_of(checkpoint, "int8"), tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    for path in (tmp_path / "old").glob("*.safetensors"):
        tensors = load_file(path)
        for name in calibrated.schemes:
            if f"{name}.weight" in tensors:
                tensors[f"{name}.weight"] = calibrated.codes(name)
        save_file(tensors, path, {"format": "pt"})
    old = CalibratedCheckpoint(tmp_path / "old")
    for name in calibrated.schemes:
        np.testing.assert_array_equal(old.linear(name).codes, calibrated.linear(name).codes)
        np.testing.assert_array_equal(old.linear(name).dequantized(), calibrated.linear(name).dequantized())
