"""The searching calibrator: better than round-to-nearest, repeatable, and a checkpoint like any other."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import small_export
import torch
from small_export import mixed_samples, plan_of

from qvlm_export.calibrate.blockwise import blocks
from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.forward import float_step, load_head, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob, Progress
from qvlm_export.calibrate.calibrators.rtn import calibrate_rtn
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, CalibratedWriter
from qvlm_export.calibrate.numerics.cholesky import LARGE
from qvlm_export.calibrate.quantization.config import FAST, FULL, SearchConfig
from qvlm_export.calibrate.quantization.fake_quantized import DequantizedSource, fake_quantized_step
from qvlm_export.calibrate.rounding.output_hessian import SKETCH_ROWS
from qvlm_export.checkpoints.checkpoint import open_checkpoint

calibrate_fast = partial(calibrate_search, method=FAST)


def run(checkpoint, samples, source, step) -> torch.Tensor:
    blocks = make_blocks(checkpoint.hf_config)
    features = run_vision_blocks(blocks, source, samples, step)
    hidden = run_decoder_blocks(blocks, source, samples, features, step)
    return torch.cat([load_head(source, checkpoint.config.text.rms_norm_eps).logits(h[0]) for h in hidden])


def calibrated(checkpoint, preset, folder, method, samples=None) -> CalibratedCheckpoint:
    job = CalibrationJob(
        make_blocks(checkpoint.hf_config),
        checkpoint.source,
        plan_of(checkpoint, preset),
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
    wanted = run(checkpoint, samples, checkpoint.source, float_step(checkpoint.source))
    everywhere, there = [], []
    for number, method in enumerate((calibrate_rtn, calibrate_fast, partial(calibrate_search, method=FULL))):
        found = calibrated(checkpoint, preset, tmp_path / str(number), method, samples)
        source = DequantizedSource(found)
        wrong = run(checkpoint, samples, source, fake_quantized_step(found, source)) - wanted
        everywhere.append(float(wrong.norm()))
        there.append(float(wrong[answers].norm()))
    assert everywhere[1] < 0.8 * everywhere[0]
    assert there[1] < 0.8 * there[0]
    assert there[2] < 0.8 * there[0]
    # Of four samples and a random model, `full` learns little about other prompts, and which outputs count.
    assert there[2] < 2 * there[1]


def test_the_tower_is_optimised_for_the_language_model_for_itself_or_not_at_all(llava, tmp_path):
    checkpoint = open_checkpoint(str(llava(dtype="float32")))
    samples = [replace(sample, answer_start=len(sample.input_ids) - 4) for sample in mixed_samples(checkpoint)]
    codes = {}
    for vision in ("language", "own", "none"):
        method = SearchConfig(token_weighting="logits", vision=vision)
        searched = partial(calibrate_search, method=method)
        found = calibrated(checkpoint, "int8", tmp_path / vision, searched, samples)
        codes[vision] = {name: found.linear(name).codes for name in found.schemes}
    nearest = calibrated(checkpoint, "int8", tmp_path / "nearest", calibrate_rtn, samples)
    for name in nearest.schemes:
        tower = not name.startswith("language_model")
        assert np.array_equal(codes["none"][name], nearest.linear(name).codes) == tower, name
        if tower:
            assert not np.array_equal(codes["own"][name], codes["none"][name])
            assert not np.array_equal(codes["own"][name], codes["language"][name])


@pytest.mark.parametrize("objective", ["plain", "logits"])
def test_same_bytes_twice_and_forwards_counted(llava, tmp_path, objective):
    checkpoint = open_checkpoint(str(llava(dtype="float16")))
    method = partial(calibrate_search, method=replace(FAST, token_weighting=objective))
    one, two = (calibrated(checkpoint, "int4", tmp_path / name, method) for name in ("one", "two"))
    files = sorted(path.name for path in one.folder.iterdir())
    assert files == sorted(path.name for path in two.folder.iterdir())
    for name in files:
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes(), name
    # 1 float run, 1 quantized one; 4 prompts, 4 pictures. What tokens count: one there and one back.
    runs, asked = 2 * 4 + 4 * 4, objective == "logits"
    assert one.summary["block_forwards"] == (2 + asked) * runs
    assert one.summary["block_backwards"] == asked * runs


def test_fast_takes_no_gradients():
    assert (FAST.token_weighting, FAST.learn_steps) == ("plain", 0)


@pytest.mark.parametrize("steps", [0, 2])
def test_no_hook_is_left_behind(llava, tmp_path, steps):
    """A hook would keep the codes of its block in memory for as long as the model lives."""
    checkpoint = open_checkpoint(str(llava()))
    blocks, samples = make_blocks(checkpoint.hf_config), mixed_samples(checkpoint)
    job = CalibrationJob(blocks, checkpoint.source, plan_of(checkpoint, "int8"), samples)
    calibrate_search(job, CalibratedWriter(tmp_path), lambda *_: None, SearchConfig(learn_steps=steps))
    for block in blocks.all():
        assert not any(layer._forward_pre_hooks for layer in block.module.modules())


def briefly_full(job: CalibrationJob, writer: CalibratedWriter, progress: Progress) -> dict[str, Any]:
    """Every step of `full`, fewer of each."""
    return calibrate_search(job, writer, progress, replace(FULL, equalization="search", learn_steps=20))


def assert_threads_do_not_show(checkpoint, preset, folder, method, more=2) -> None:
    """The same bytes on one and on `more`."""
    folders, before = [], torch.get_num_threads()
    try:
        for count in (1, more):
            torch.set_num_threads(count)
            folders.append(calibrated(checkpoint, preset, folder / str(count), method).folder)
    finally:
        torch.set_num_threads(before)
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name


@pytest.mark.parametrize("method", [calibrate_fast, briefly_full], ids=["fast", "full"])
def test_same_bytes_on_one_thread_and_on_two(llava, tmp_path, method):
    checkpoint = open_checkpoint(str(llava(dtype="float16")))
    assert_threads_do_not_show(checkpoint, "int8", tmp_path, method)


@pytest.mark.parametrize("calibrator", [calibrate_rtn, calibrate_fast], ids=["rtn", "fast"])
@pytest.mark.parametrize(("preset", "count"), [("int4", 2), ("int8", 3)])
def test_threads_do_not_show_where_blocks_are_large_enough_to_share(llava, tmp_path, preset, count, calibrator):
    """Products by two threads, of five rows too, and a factorization by blocks of columns."""
    text = {"hidden_size": 768, "intermediate_size": LARGE + 128, "num_hidden_layers": 1}
    checkpoint = open_checkpoint(str(llava(dtype="float16", text=text, vision={"num_hidden_layers": 3})))
    assert 3 * 768 * (LARGE + 128) > blocks.SMALL_BLOCK
    assert_threads_do_not_show(checkpoint, preset, tmp_path, calibrator, count)


def test_threads_do_not_show_in_rounding_for_the_answers(llava, tmp_path, monkeypatch):
    """Gradients, their sketches, and learning: of blocks a little smaller, as they take long."""
    monkeypatch.setattr(blocks, "SMALL_BLOCK", 2**20)
    text = {"hidden_size": 384, "intermediate_size": SKETCH_ROWS + 64, "num_hidden_layers": 1}
    checkpoint = open_checkpoint(str(llava(dtype="float16", text=text, vision={"num_hidden_layers": 3})))
    assert_threads_do_not_show(checkpoint, "int8", tmp_path, small_export.briefly_full, 3)


def test_stored_types_and_ranges(llava, tmp_path):
    checkpoint = open_checkpoint(str(llava(dtype="bfloat16")))
    found = calibrated(checkpoint, "int4", tmp_path / "c", calibrate_fast)
    for name, scheme in found.schemes.items():
        linear = found.linear(name)
        assert linear.codes.min() >= scheme.qmin
        assert linear.codes.max() <= scheme.qmax
        assert linear.scale.dtype == (np.float16 if scheme.weight_bits == 4 else np.float32)
        assert (linear.scale > 0).all()
    # A folded gain was rounded to float16; bfloat16 would round it again, and the readers would not know.
    assert found.floats.dtype("language_model.model.layers.0.input_layernorm.weight") == np.float16
    assert str(found.floats.dtype("language_model.model.norm.weight")) == "bfloat16"


@pytest.mark.parametrize("method", [calibrate_fast, briefly_full], ids=["fast", "full"])
def test_linears_that_read_one_input_quantize_it_once(llava, tmp_path, method):
    found = calibrated(open_checkpoint(str(llava(dtype="float32"))), "int8", tmp_path, method)
    inputs = {name: found.linear(name).input_scale for name in found.schemes}
    for name, scale in inputs.items():
        for first, others in {"q_proj": ("k_proj", "v_proj"), "gate_proj": ("up_proj",)}.items():
            if name.endswith(first):
                assert all(inputs[name.replace(first, other)] == scale for other in others), name
