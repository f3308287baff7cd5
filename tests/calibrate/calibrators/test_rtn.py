"""Round-to-nearest with absmax ranges, against transformers' model run whole: scales, codes, and what is refused."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from small_export import calibrate, make_sample, mixed_samples, module_of, of_part, open_small, schemes_of
from transformers import LlavaForConditionalGeneration

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.calibrators.cost import estimate_calibration_cost
from qvlm_export.calibrate.calibrators.rtn import calibrate_rtn
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, CalibratedWriter
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization import record as record_parts
from qvlm_export.calibrate.quantization.quantizer import activation_scale, quantize_linear, sqnr_db
from qvlm_export.checkpoints.families import find_layout, make_renamer

W4A16 = LinearScheme(weight_bits=4, activation_bits=None, group_size=128)
Q_PROJ = "language_model.model.layers.1.self_attn.q_proj"
FC1 = "vision_tower.vision_model.encoder.layers.2.mlp.fc1"


def input_amax(folder, names, samples):
    """Returns max |input| of each linear, from hooks on transformers' model run whole, one sample at a time."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    amax = dict.fromkeys(names, 0.0)

    def make_hook(name):
        def hook(_, args):
            amax[name] = max(amax[name], args[0].abs().max().item())

        return hook

    for name in names:
        module_of(model, name).register_forward_pre_hook(make_hook(name))
    with torch.no_grad():
        for sample in samples:
            pixels = torch.from_numpy(sample.pixel_values) if len(sample.pixel_values) else None
            model(input_ids=torch.from_numpy(sample.input_ids)[None], pixel_values=pixels)
    return amax


@pytest.mark.parametrize(
    "changes",
    [{}, {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}, {"kv_heads": 4, "dtype": "bfloat16"}],
    ids=["default", "whole-tower", "bfloat16"],
)
def test_input_scales_are_those_of_the_whole_model(llava, tmp_path, changes):
    checkpoint = open_small(llava(**changes))
    schemes = schemes_of(checkpoint, "int8")
    samples = mixed_samples(checkpoint)
    calibrated = calibrate(checkpoint, schemes, tmp_path, samples)
    amax = input_amax(checkpoint.folder, schemes, samples)
    assert len(set(amax.values())) > len(schemes) / 4
    for name, largest in amax.items():
        # The order of additions depends on the batch: a part in 100,000, far below a float16 step.
        low, high = activation_scale(largest * (1 - 1e-5), 8), activation_scale(largest * (1 + 1e-5), 8)
        assert low <= calibrated.input_scale(name) <= high


def test_the_sample_with_the_largest_values_sets_the_scale_wherever_it_is_in_the_set(llava, tmp_path):
    checkpoint = open_small(llava())
    samples = mixed_samples(checkpoint)
    loud = Sample(samples[0].input_ids, samples[0].pixel_values * 50, samples[0].answer_start)
    schemes = {"vision_tower.vision_model.encoder.layers.0.mlp.fc2": W8A8, FC1: W8A8}
    first = calibrate(checkpoint, schemes, tmp_path / "first", [loud, *samples])
    last = calibrate(checkpoint, schemes, tmp_path / "last", [*samples, loud])
    without = calibrate(checkpoint, schemes, tmp_path / "without", samples)
    assert [first.input_scale(n) for n in schemes] == [last.input_scale(n) for n in schemes]
    assert [without.input_scale(n) for n in schemes] != [last.input_scale(n) for n in schemes]


def test_codes_are_the_rounded_source_weights(llava, tmp_path):
    checkpoint = open_small(llava())
    calibrated = calibrate(checkpoint, schemes_of(checkpoint, "int4"), tmp_path)
    for name, scheme in calibrated.schemes.items():
        weight = torch.from_numpy(checkpoint.source.load(f"{name}.weight").astype(np.float32))
        expected = quantize_linear(weight, scheme, 1.0)
        np.testing.assert_array_equal(calibrated.codes(name), expected.codes)
        np.testing.assert_array_equal(calibrated.scale(name), expected.scale)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tensors_that_are_not_quantized_stay_as_in_the_source(llava, tmp_path, dtype):
    checkpoint = open_small(llava(dtype=dtype))
    schemes = {Q_PROJ: W4A16, FC1: W8A8}
    calibrated = calibrate(checkpoint, schemes, tmp_path)
    stored = {f"{Q_PROJ}.weight_packed", f"{Q_PROJ}.weight_shape", f"{Q_PROJ}.weight_scale"}
    stored |= {f"{FC1}.weight", f"{FC1}.weight_scale", f"{FC1}.input_scale"}
    unchanged = set(checkpoint.source) - {f"{name}.weight" for name in schemes}
    assert set(calibrated.floats) == unchanged | stored
    for name in unchanged:
        copied, original = calibrated.floats.load(name), checkpoint.source.load(name)
        assert (copied.dtype, copied.shape, copied.tobytes()) == (original.dtype, original.shape, original.tobytes())


def damage(folder, source, name, value):
    """Copies the checkpoint `source` and replaces the last value of the tensor of this canonical name."""
    shutil.copytree(source, folder)
    path, rename = folder / "model.safetensors", make_renamer(find_layout({}))
    tensors = load_file(path)
    (stored,) = [key for key in tensors if rename(key) == name]
    array = tensors[stored].copy()
    array.reshape(-1)[-1] = value
    save_file({**tensors, stored: array}, path, {"format": "pt"})
    return open_small(folder)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize(
    "name",
    [
        f"{Q_PROJ}.weight",  # to be quantized
        f"{FC1}.bias",
        "language_model.model.layers.0.input_layernorm.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.3.mlp.fc2.weight",  # of a layer that does not run
    ],
)
def test_a_tensor_with_nan_or_infinity_is_refused_by_name(llava, tmp_path, name, value):
    checkpoint = damage(tmp_path / "damaged", llava(), name, value)
    with pytest.raises(UserError, match=f"^{re.escape(name)}: holds NaN or infinite values"):
        calibrate(checkpoint, {Q_PROJ: W4A16}, tmp_path / "out")


@pytest.mark.parametrize(("name", "scheme"), [(Q_PROJ, W4A16), (FC1, W8A8)])
def test_a_weight_beyond_float16_is_refused_by_name(llava, tmp_path, name, scheme):
    checkpoint = damage(tmp_path / "damaged", llava(dtype="bfloat16"), f"{name}.weight", 1e6)
    with pytest.raises(UserError, match=f"^{re.escape(name)}.weight: holds values beyond float16's 65504"):
        calibrate(checkpoint, {name: scheme}, tmp_path / "out")


def test_texts_without_images_are_refused_for_the_vision_tower(llava, tmp_path):
    checkpoint = open_small(llava())
    samples = [make_sample(checkpoint, words=8, images=0, seed=seed) for seed in range(2)]
    with pytest.raises(UserError, match=f"^{re.escape(FC1)}: no calibration sample reached it") as error:
        calibrate(checkpoint, {Q_PROJ: W4A16, FC1: W8A8}, tmp_path, samples)
    assert "add samples" in str(error.value)


def test_texts_without_images_calibrate_the_decoder(llava, tmp_path):
    checkpoint = open_small(llava())
    samples = [make_sample(checkpoint, words=words, images=0, seed=words) for words in (8, 3)]
    schemes = of_part(schemes_of(checkpoint, "int8"), "language")
    calibrated = calibrate(checkpoint, schemes, tmp_path, samples)
    for name, largest in input_amax(checkpoint.folder, schemes, samples).items():
        low, high = activation_scale(largest * (1 - 1e-5), 8), activation_scale(largest * (1 + 1e-5), 8)
        assert low <= calibrated.input_scale(name) <= high


def test_a_sample_with_too_few_image_tokens_is_refused_with_both_counts(llava, tmp_path):
    checkpoint = open_small(llava())
    good = make_sample(checkpoint, words=8, images=1, seed=0)
    with pytest.raises(UserError, match=r"has 35 image tokens for 36 image features; does the processor belong"):
        calibrate(checkpoint, {Q_PROJ: W8A8}, tmp_path, [Sample(good.input_ids[2:], good.pixel_values, 0)])


def test_activations_that_are_not_finite_are_refused_by_block_and_sample(llava, tmp_path):
    checkpoint = open_small(llava())
    good, bad = (make_sample(checkpoint, words=8, images=1, seed=seed) for seed in range(2))
    bad.pixel_values[0, 0, 0, 0] = np.inf
    with pytest.raises(UserError, match=r"^vision_tower\.vision_model\.encoder\.layers\.0: activations of sample 2 "):
        calibrate(checkpoint, {FC1: W8A8}, tmp_path, [good, bad])


def test_blocks_behind_the_last_quantized_activation_are_not_run(llava, tmp_path):
    """Their codes are the same as if they had been run."""
    checkpoint = open_small(llava())
    decoder = {name: scheme for name, scheme in schemes_of(checkpoint, "int4").items() if name.startswith("language_model.")}
    runs = {
        "neither": ({Q_PROJ: W4A16}, 0),
        "vision": ({FC1: W8A8, **decoder}, 3 + 1),
        "both": ({FC1: W8A8, **decoder, Q_PROJ: W8A8}, 3 + 1 + 2),
    }
    results = {}
    for name, (schemes, num_run) in runs.items():
        blocks, ran = make_blocks(checkpoint.hf_config), []
        for block in blocks.all():
            block.module.register_forward_hook(lambda *_, block=block, ran=ran: ran.append(block.prefix))
        job = CalibrationJob(blocks, checkpoint.source, schemes, mixed_samples(checkpoint))
        writer = CalibratedWriter(tmp_path / name)
        writer.finish(checkpoint.config_json, calibrate_rtn(job, writer, lambda *_: None))
        assert len(set(ran)) == num_run
        results[name] = CalibratedCheckpoint(tmp_path / name)
    for linear in decoder:
        if linear != Q_PROJ:
            np.testing.assert_array_equal(results["vision"].codes(linear), results["both"].codes(linear))
    np.testing.assert_array_equal(results["neither"].codes(Q_PROJ), results["vision"].codes(Q_PROJ))


@pytest.mark.parametrize("preset", ["int4", "int8", "sim-w4a4"])
def test_the_same_run_twice_writes_the_same_bytes(llava, tmp_path, preset):
    checkpoint = open_small(llava())
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        calibrate(checkpoint, schemes_of(checkpoint, preset), folder)
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert one == two
    assert len(one) == 3 + 1 + 2 + 3 + 2  # vision layers, projector, decoder layers, JSON files, a rest shard of either part


def test_progress_counts_the_blocks_and_the_summary_names_them(llava, tmp_path):
    checkpoint = open_small(llava())
    samples = mixed_samples(checkpoint)
    steps = []
    job = CalibrationJob(make_blocks(checkpoint.hf_config), checkpoint.source, {Q_PROJ: W4A16}, samples)
    summary = calibrate_rtn(job, CalibratedWriter(tmp_path), lambda *step: steps.append(step))
    assert [step[:2] for step in steps] == [(n, 6) for n in range(1, 7)]
    assert steps[3][2] == "multi_modal_projector"
    assert steps[5][2] == "language_model.model.layers.1"
    totals = {key: value for key, value in summary.items() if key != "blocks"}
    assert totals == {"method": "rtn", "samples": 4, "tokens": 9 + 36 + 5 + 17 + 72 + 12 + 36, "block_forwards": 0}
    assert [(block["name"], block["linears"].keys()) for block in summary["blocks"]] == [
        (step[2], {Q_PROJ} & {f"{step[2]}.self_attn.q_proj"}) for step in steps
    ]


@pytest.mark.parametrize("preset", ["int4", "int8", "sim-w4a8"])
def test_the_record_of_every_linear_agrees_with_the_checkpoint(llava, tmp_path, preset, monkeypatch):
    monkeypatch.setattr(record_parts, "SQNR_CHANNELS", 16)
    checkpoint = open_small(llava())
    blocks, schemes, samples = make_blocks(checkpoint.hf_config), schemes_of(checkpoint, preset), mixed_samples(checkpoint)
    calibrated = calibrate(checkpoint, schemes, tmp_path, samples)
    records = {name: record for block in calibrated.summary["blocks"] for name, record in block["linears"].items()}
    assert records.keys() == schemes.keys()
    for name, record in records.items():
        scheme, linear = schemes[name], calibrated.linear(name)
        exact = torch.from_numpy(checkpoint.source.load(f"{name}.weight").astype(np.float32))
        whole = sqnr_db(exact, torch.from_numpy(linear.dequantized()))
        assert record["weight_sqnr_db"] == pytest.approx(whole, abs=1.0)
        assert record["weight_sqnr_db"] != whole  # measured on some output channels only
        columns = exact.shape[1]
        scale_bits = 16 / scheme.group_size if scheme.group_size else 32 / columns
        assert record["bits_per_weight"] == pytest.approx(scheme.weight_bits + scale_bits)
        assert record["input_scale"] == linear.input_scale
        assert record["sqnr_db"] is None
        if scheme.activation_bits is None:
            assert record["range_coverage"] is None
        else:
            assert 1.0 <= record["range_coverage"] < 1.001
    estimated = estimate_calibration_cost(blocks, schemes, samples, None).forwards
    assert calibrated.summary["block_forwards"] == estimated > 0


def test_sqnr_of_a_small_linear_is_measured_on_all_its_channels():
    weight = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    linear = quantize_linear(weight, W8A8, 1.0)
    expected = sqnr_db(weight, torch.from_numpy(linear.dequantized()))
    assert record_parts.measure_weight_sqnr(weight, linear).weight_db == expected
