"""The block-wise search: better than round-to-nearest, the same bytes every time, and a checkpoint like any other."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import small_export
import torch
from small_export import mixed_samples, schemes_of

from qvlm_export.calibrate.blockwise import blocks
from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.forward import float_step, load_head, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob, Progress
from qvlm_export.calibrate.calibrators.rtn import calibrate_rtn
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, CalibratedWriter
from qvlm_export.calibrate.numerics.cholesky import MIN_BLOCKED_ROWS
from qvlm_export.calibrate.quantization.config import FAST, FULL, FULL_LARGE, SearchConfig
from qvlm_export.calibrate.quantization.fake_quantized import DequantizedSource, fake_quantized_step
from qvlm_export.calibrate.rounding.output_hessian import SKETCH_ROWS
from qvlm_export.checkpoints.checkpoint import open_checkpoint

calibrate_fast = partial(calibrate_search, config=FAST)


def compute_logits(checkpoint, samples, source, step) -> torch.Tensor:
    """Logits of all tokens of all samples, float32 [tokens, vocabulary]."""
    blocks = make_blocks(checkpoint.hf_config)
    features = run_vision_blocks(blocks, source, samples, step)
    hidden = run_decoder_blocks(blocks, source, samples, features, step)
    return torch.cat([load_head(source, checkpoint.config.text.rms_norm_eps).logits(h[0]) for h in hidden])


def calibrated(checkpoint, preset, folder, method, samples=None) -> CalibratedCheckpoint:
    job = CalibrationJob(
        make_blocks(checkpoint.hf_config),
        checkpoint.source,
        schemes_of(checkpoint, preset),
        samples or mixed_samples(checkpoint),
    )
    writer = CalibratedWriter(folder)
    writer.finish(checkpoint.config_json, method(job, writer, lambda *_: None))
    return CalibratedCheckpoint(folder)


@pytest.mark.parametrize("preset", ["int4", "int8"])
def test_logits_are_closer_to_the_float_model_than_with_absmax(llava, tmp_path, preset):
    checkpoint = open_checkpoint(str(llava(dtype="float32")))
    samples = [replace(sample, answer_start=len(sample.input_ids) - 4) for sample in mixed_samples(checkpoint)]
    answers = torch.cat([torch.arange(len(s.input_ids)) >= s.answer_start - 1 for s in samples])
    float_logits = compute_logits(checkpoint, samples, checkpoint.source, float_step(checkpoint.source))
    all_errors, answer_errors = [], []
    for number, method in enumerate((calibrate_rtn, calibrate_fast, partial(calibrate_search, config=FULL))):
        quantized = calibrated(checkpoint, preset, tmp_path / str(number), method, samples)
        source = DequantizedSource(quantized)
        error = compute_logits(checkpoint, samples, source, fake_quantized_step(quantized, source)) - float_logits
        all_errors.append(float(error.norm()))
        answer_errors.append(float(error[answers].norm()))
    assert all_errors[1] < 0.8 * all_errors[0]
    assert answer_errors[1] < 0.8 * answer_errors[0]
    assert answer_errors[2] < 0.8 * answer_errors[0]
    # From four samples and a random model, `full` learns little about other prompts, and about which outputs matter; `fast`
    # fits these samples closely.
    assert answer_errors[2] < 3 * answer_errors[1]


def test_the_vision_target_decides_what_the_tower_is_optimized_for(llava, tmp_path):
    """For the language model, for its own output, or not at all, which is round-to-nearest."""
    checkpoint = open_checkpoint(str(llava(dtype="float32")))
    samples = [replace(sample, answer_start=len(sample.input_ids) - 4) for sample in mixed_samples(checkpoint)]
    codes = {}
    for vision in ("language", "own", "none"):
        method = SearchConfig(token_weighting="logits", vision_target=vision)
        calibrator = partial(calibrate_search, config=method)
        quantized = calibrated(checkpoint, "int8", tmp_path / vision, calibrator, samples)
        codes[vision] = {name: quantized.linear(name).codes for name in quantized.schemes}
    rtn = calibrated(checkpoint, "int8", tmp_path / "rtn", calibrate_rtn, samples)
    for name in rtn.schemes:
        is_vision = not name.startswith("language_model")
        assert np.array_equal(codes["none"][name], rtn.linear(name).codes) == is_vision, name
        if is_vision:
            assert not np.array_equal(codes["own"][name], codes["none"][name])
            assert not np.array_equal(codes["own"][name], codes["language"][name])


@pytest.mark.parametrize("token_weighting", ["plain", "logits"])
def test_the_same_search_twice_writes_the_same_bytes_and_counts_its_passes(llava, tmp_path, token_weighting):
    checkpoint = open_checkpoint(str(llava(dtype="float16")))
    method = partial(calibrate_search, config=replace(FAST, token_weighting=token_weighting))
    one, two = (calibrated(checkpoint, "int4", tmp_path / name, method) for name in ("one", "two"))
    files = sorted(path.name for path in one.folder.iterdir())
    assert files == sorted(path.name for path in two.folder.iterdir())
    for name in files:
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes(), name
    # 1 float run and 1 quantized run of 4 prompts and 4 images; token sensitivity takes 1 forward and 1 backward.
    runs, measured = 2 * 4 + 4 * 4, token_weighting == "logits"
    assert one.summary["block_forwards"] == (2 + measured) * runs
    assert one.summary["block_backwards"] == measured * runs


def test_fast_takes_no_gradients():
    assert FAST.token_weighting == "output"
    assert not FAST.needs_gradients()


def test_the_search_removes_all_hooks(llava, tmp_path):
    """A hook would hold the codes of its block in memory for as long as the model lives."""
    checkpoint = open_checkpoint(str(llava()))
    blocks, samples = make_blocks(checkpoint.hf_config), mixed_samples(checkpoint)
    job = CalibrationJob(blocks, checkpoint.source, schemes_of(checkpoint, "int8"), samples)
    calibrate_search(job, CalibratedWriter(tmp_path), lambda *_: None, SearchConfig())
    for block in blocks.all():
        assert not any(layer._forward_pre_hooks for layer in block.module.modules())


def briefly_full(job: CalibrationJob, writer: CalibratedWriter, progress: Progress) -> dict[str, Any]:
    """Every stage of `full` of a small decoder with fewer prompts, and equalization by search."""
    prompts = {"questions_per_image": 2, "random_word_prompts": 2}
    return calibrate_search(job, writer, progress, replace(FULL, equalization="search", **prompts))


def calibrate_large(job: CalibrationJob, writer: CalibratedWriter, progress: Progress) -> dict[str, Any]:
    """`full` of a large decoder."""
    return calibrate_search(job, writer, progress, FULL_LARGE)


def assert_same_bytes_on_any_threads(checkpoint, preset, folder, method, more=2) -> None:
    """Asserts that calibrating on one thread and on `more` threads writes the same bytes."""
    folders, before = [], torch.get_num_threads()
    try:
        for count in (1, more):
            torch.set_num_threads(count)
            folders.append(calibrated(checkpoint, preset, folder / str(count), method).folder)
    finally:
        torch.set_num_threads(before)
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name


@pytest.mark.parametrize("method", [calibrate_fast, briefly_full, calibrate_large], ids=["fast", "full", "large"])
def test_same_bytes_on_one_thread_and_on_two(llava, tmp_path, method):
    checkpoint = open_checkpoint(str(llava(dtype="float16")))
    assert_same_bytes_on_any_threads(checkpoint, "int8", tmp_path, method)


@pytest.mark.parametrize("calibrator", [calibrate_rtn, calibrate_fast], ids=["rtn", "fast"])
@pytest.mark.parametrize(("preset", "count"), [("int4", 2), ("int8", 3)])
def test_same_bytes_on_any_threads_where_threads_share_large_blocks(llava, tmp_path, preset, count, calibrator):
    """Threads share matrix products, those of five rows too, and a factorization by blocks of columns."""
    text = {"hidden_size": 768, "intermediate_size": MIN_BLOCKED_ROWS + 128, "num_hidden_layers": 1}
    checkpoint = open_checkpoint(str(llava(dtype="float16", text=text, vision={"num_hidden_layers": 3})))
    assert 3 * 768 * (MIN_BLOCKED_ROWS + 128) > blocks.SMALL_BLOCK
    assert_same_bytes_on_any_threads(checkpoint, preset, tmp_path, calibrator, count)


def test_same_bytes_on_any_threads_with_kronecker_rounding(llava, tmp_path, monkeypatch):
    """Covers gradients and their sketches, on blocks a little smaller, as these take long."""
    monkeypatch.setattr(blocks, "SMALL_BLOCK", 2**20)
    text = {"hidden_size": 384, "intermediate_size": SKETCH_ROWS + 64, "num_hidden_layers": 1}
    checkpoint = open_checkpoint(str(llava(dtype="float16", text=text, vision={"num_hidden_layers": 3})))
    assert_same_bytes_on_any_threads(checkpoint, "int8", tmp_path, small_export.briefly_full, 3)


def test_stored_codes_scales_and_gains_have_the_types_and_ranges_of_their_schemes(llava, tmp_path):
    checkpoint = open_checkpoint(str(llava(dtype="bfloat16")))
    quantized = calibrated(checkpoint, "int4", tmp_path / "c", calibrate_fast)
    for name, scheme in quantized.schemes.items():
        linear = quantized.linear(name)
        assert linear.codes.min() >= scheme.qmin
        assert linear.codes.max() <= scheme.qmax
        assert linear.scale.dtype == (np.float16 if scheme.weight_bits == 4 else np.float32)
        assert (linear.scale > 0).all()
    # An equalized gain was rounded to float16; bfloat16 would round it again, and the linears behind it would not match.
    assert quantized.floats.dtype("language_model.model.layers.0.input_layernorm.weight") == np.float16
    assert str(quantized.floats.dtype("language_model.model.norm.weight")) == "bfloat16"


@pytest.mark.parametrize("method", [calibrate_fast, briefly_full, calibrate_large], ids=["fast", "full", "large"])
def test_linears_that_share_an_input_share_its_scale(llava, tmp_path, method):
    quantized = calibrated(open_checkpoint(str(llava(dtype="float32"))), "int8", tmp_path, method)
    scales = {name: quantized.linear(name).input_scale for name in quantized.schemes}
    for name, scale in scales.items():
        for first, others in {"q_proj": ("k_proj", "v_proj"), "gate_proj": ("up_proj",)}.items():
            if name.endswith(first):
                assert all(scales[name.replace(first, other)] == scale for other in others), name
