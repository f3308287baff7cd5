"""The analytical cost model, against what is counted at run time and against sums worked out by hand."""

from __future__ import annotations

import pytest
from small_export import mixed_samples, open_small, schemes_of

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.calibrators import block_cost
from qvlm_export.calibrate.calibrators.block_cost import Cost
from qvlm_export.calibrate.calibrators.cost import estimate_calibration_cost, is_narrow
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedWriter
from qvlm_export.calibrate.quantization.config import (
    FAST,
    FULL_LARGE,
    KRONECKER_LINEAR,
    LinearConfig,
    SearchConfig,
)


@pytest.mark.parametrize(
    "method",
    [
        FAST,
        SearchConfig(equalization="expected", token_weighting="modality"),
        SearchConfig(equalization="none", token_weighting="logits", questions_per_image=3),
        SearchConfig(equalization="search", token_weighting="logits", vision_target="own"),
        SearchConfig(equalization="search", token_weighting="logits", vision_target="none"),
        SearchConfig(equalization="none", linear=LinearConfig(rounding="nearest", ridge=None)),
        SearchConfig("none", KRONECKER_LINEAR, "kl+logits", leverage=False),
        SearchConfig("none", token_weighting="logits", random_word_prompts=3),
        SearchConfig("none", KRONECKER_LINEAR, "kl+logits", questions_per_image=2),
        FULL_LARGE,
    ],
)
def test_estimated_forwards_equal_those_of_the_search(llava, tmp_path, method):
    checkpoint = open_small(llava())
    blocks, schemes, samples = make_blocks(checkpoint.hf_config), schemes_of(checkpoint, "int8"), mixed_samples(checkpoint)
    job = CalibrationJob(blocks, checkpoint.source, schemes, samples)
    summary = calibrate_search(job, CalibratedWriter(tmp_path), lambda *_: None, method)
    estimate = estimate_calibration_cost(blocks, schemes, samples, method)
    assert estimate.forwards == pytest.approx(summary["block_forwards"], abs=1)


def test_cost_of_round_to_nearest_equals_the_sum_worked_out_by_hand(llava):
    """int8: every block runs once. int4: the decoder does not run at all, as its activations stay float."""
    checkpoint = open_small(llava())
    blocks, samples, config = make_blocks(checkpoint.hf_config), mixed_samples(checkpoint), checkpoint.config
    int8 = estimate_calibration_cost(blocks, schemes_of(checkpoint, "int8"), samples, None)
    text, vision = config.text, config.vision
    decoder = text.hidden_size * (text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    decoder += text.hidden_size * text.num_heads * text.head_dim + 3 * text.hidden_size * text.intermediate_size
    tower = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    projector = vision.hidden_size * text.hidden_size + text.hidden_size**2
    lengths, images = [len(s.input_ids) for s in samples], sum(len(s.pixel_values) for s in samples)
    patches = vision.num_patches + 1
    decoder_flops = 2 * decoder * sum(lengths) * 2 + 4 * sum(n**2 for n in lengths) * text.hidden_size * 2
    vision_flops = 2 * tower * patches * images * 3 + 4 * images * patches**2 * vision.hidden_size * 3
    vision_flops += 2 * projector * patches * images
    assert int8.flops == decoder_flops + vision_flops
    assert int8.rounded == 2 * decoder + 3 * tower + projector
    int4 = estimate_calibration_cost(blocks, schemes_of(checkpoint, "int4"), samples, None)
    assert (int4.flops, int4.rounded) == (vision_flops, int8.rounded)
    assert int4.forwards == 4 * images


def test_memory_of_a_sum_is_that_of_the_larger_part():
    assert Cost(1.0, memory_bytes=5) + Cost(2.0, memory_bytes=3) == Cost(3.0, memory_bytes=5)


def test_large_factorizations_are_shared_by_threads_and_small_ones_are_not(llava, monkeypatch):
    checkpoint = open_small(llava())
    blocks, schemes, samples = make_blocks(checkpoint.hf_config), schemes_of(checkpoint, "int4"), mixed_samples(checkpoint)
    small = estimate_calibration_cost(blocks, schemes, samples, FAST)
    monkeypatch.setattr(block_cost, "MIN_BLOCKED_ROWS", 1)
    large = estimate_calibration_cost(blocks, schemes, samples, FAST)
    assert small.single_flops > 0 == large.single_flops
    assert large.shared_flops == pytest.approx(small.shared_flops + small.single_flops)
    assert small.shared_flops > 0  # of solving by a factor
    assert large.flops == small.flops


def test_few_samples_of_a_small_model_stay_in_32_bits(llava):
    checkpoint = open_small(llava())
    blocks, samples = make_blocks(checkpoint.hf_config), mixed_samples(checkpoint)
    assert not is_narrow(blocks, samples, FAST)
    assert is_narrow(blocks, samples * 10_000, FAST)
