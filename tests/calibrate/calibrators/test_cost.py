"""What is counted beforehand, against what is counted and stored at run time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_export import mixed_samples, open_small, plan_of

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.calibrators import cost
from qvlm_export.calibrate.calibrators.cost import Cost, estimate_calibration_cost, is_narrow
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedWriter
from qvlm_export.calibrate.quantization.config import FAST, KRONECKER_LINEAR, RTN_LINEAR, LinearConfig, SearchConfig


@pytest.mark.parametrize(
    "method",
    [
        FAST,
        SearchConfig(equalization="expected", token_weighting="modality"),
        SearchConfig(equalization="none", token_weighting="logits", questions=3),
        SearchConfig(equalization="search", token_weighting="logits", vision="own"),
        SearchConfig(equalization="search", token_weighting="logits", vision="none"),
        SearchConfig(equalization="none", linear=LinearConfig(rounding="nearest", ridge=None)),
        SearchConfig("none", KRONECKER_LINEAR, "kl+logits", leverage=False),
        SearchConfig("none", token_weighting="logits", random_word_prompts=3),
        SearchConfig("none", KRONECKER_LINEAR, "kl+logits", questions=2, mixup_prompts=2),  # a random model is never decided
    ],
)
def test_forwards_are_those_of_the_search(llava, tmp_path, method):
    checkpoint = open_small(llava())
    blocks, plan, samples = make_blocks(checkpoint.hf_config), plan_of(checkpoint, "int8"), mixed_samples(checkpoint)
    job = CalibrationJob(blocks, checkpoint.source, plan, samples)
    found = calibrate_search(job, CalibratedWriter(tmp_path), lambda *_: None, method)
    assert estimate_calibration_cost(blocks, plan, samples, method).forwards == pytest.approx(found["block_forwards"], abs=1)


def test_forwards_of_learning(llava, tmp_path):
    """A step takes as many prompts as its tokens hold."""
    checkpoint = open_small(llava())
    blocks, plan, samples = (
        make_blocks(checkpoint.hf_config),
        plan_of(checkpoint, "int8"),
        mixed_samples(checkpoint)[:1] * 64,
    )
    job, method = CalibrationJob(blocks, checkpoint.source, plan, samples), SearchConfig("none", RTN_LINEAR, learn_steps=8)
    found = calibrate_search(job, CalibratedWriter(tmp_path), lambda *_: None, method)
    counted = estimate_calibration_cost(blocks, plan, samples, method)
    assert counted.forwards == pytest.approx(found["block_forwards"], rel=0.05)
    without = estimate_calibration_cost(blocks, plan, samples, replace(method, learn_steps=0))
    assert counted.flops > without.flops
    assert counted.memory_bytes > without.memory_bytes


def test_round_to_nearest_counts_products_by_hand(llava):
    """int8: everything runs once. int4: the decoder does not run at all."""
    checkpoint = open_small(llava())
    blocks, samples, config = make_blocks(checkpoint.hf_config), mixed_samples(checkpoint), checkpoint.config
    whole = estimate_calibration_cost(blocks, plan_of(checkpoint, "int8"), samples, None)
    text, vision = config.text, config.vision
    decoder = text.hidden_size * (text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    decoder += text.hidden_size * text.num_heads * text.head_dim + 3 * text.hidden_size * text.intermediate_size
    tower = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    projector = vision.hidden_size * text.hidden_size + text.hidden_size**2
    lengths, pictures = [len(s.input_ids) for s in samples], sum(len(s.pixel_values) for s in samples)
    patches = vision.num_patches + 1
    flops = 2 * decoder * sum(lengths) * 2 + 4 * sum(n**2 for n in lengths) * text.hidden_size * 2
    seen = 2 * tower * patches * pictures * 3 + 4 * pictures * patches**2 * vision.hidden_size * 3
    seen += 2 * projector * patches * pictures
    assert whole.flops == flops + seen
    assert whole.rounded == 2 * decoder + 3 * tower + projector
    part = estimate_calibration_cost(blocks, plan_of(checkpoint, "int4"), samples, None)
    assert (part.flops, part.rounded) == (seen, whole.rounded)
    assert part.forwards == 4 * pictures


def test_the_largest_block_decides_the_memory():
    assert Cost(1.0, memory_bytes=5) + Cost(2.0, memory_bytes=3) == Cost(3.0, memory_bytes=5)


def test_large_factorizations_are_shared_by_threads_and_small_ones_are_not(llava, monkeypatch):
    checkpoint = open_small(llava())
    blocks, plan, samples = make_blocks(checkpoint.hf_config), plan_of(checkpoint, "int4"), mixed_samples(checkpoint)
    small = estimate_calibration_cost(blocks, plan, samples, FAST)
    monkeypatch.setattr(cost, "LARGE", 1)
    large = estimate_calibration_cost(blocks, plan, samples, FAST)
    assert small.single_flops > 0 == large.single_flops
    assert large.shared_flops == pytest.approx(small.shared_flops + small.single_flops)
    assert small.shared_flops > 0  # solving
    assert large.flops == small.flops


def test_few_samples_of_a_small_model_stay_in_32_bits(llava):
    checkpoint = open_small(llava())
    blocks, samples = make_blocks(checkpoint.hf_config), mixed_samples(checkpoint)
    assert not is_narrow(blocks, samples, FAST)
    assert is_narrow(blocks, samples * 10_000, FAST)
