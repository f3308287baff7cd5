"""Observation of the float model: its statistics, its forwards, a calibration set in parts, and what is read again."""

from __future__ import annotations

import math

import pytest
import torch
from small_export import mixed_samples, schemes_of

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.blockwise.resume import CalibrationWork
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.qvlm import observe
from qvlm_export.calibrate.qvlm.joint_search import PAPER_CLIPS
from qvlm_export.calibrate.qvlm.observe import observe_inputs
from qvlm_export.checkpoints.checkpoint import open_checkpoint

W4A4 = LinearScheme(4, 4, 64)
LAST = "language_model.model.layers.1"
NORM = "vision_tower.vision_model.encoder.layers.0"


@pytest.fixture
def job(llava):
    checkpoint = open_checkpoint(str(llava(dtype="float32")))
    schemes, samples = schemes_of(checkpoint, "int8"), mixed_samples(checkpoint)
    return CalibrationJob(make_blocks(checkpoint.hf_config), checkpoint.source, schemes, samples)


def test_inputs_are_observed_on_the_float_model(llava):
    checkpoint = open_checkpoint(str(llava(dtype="float32")))
    schemes = {f"{LAST}.mlp.up_proj": W4A4, f"{LAST}.self_attn.o_proj": LinearScheme(8, 8, None)}
    samples = mixed_samples(checkpoint)
    job = CalibrationJob(make_blocks(checkpoint.hf_config), checkpoint.source, schemes, samples)
    inputs, forwards = observe_inputs(job)
    assert [(x.block, x.linears, x.num_bits) for x in inputs] == [
        (LAST, ("self_attn.o_proj",), 8),
        (LAST, ("mlp.gate_proj", "mlp.up_proj"), 4),
    ]
    assert forwards == 4 * (1 + 2 + 1) + 2 * 4  # images through the tower and projector, prompts through the decoder
    for x in inputs:
        assert 0 < x.entropy < x.num_bits * math.log(2)
        amax = [x.ranges[clip] for clip in PAPER_CLIPS]
        assert amax == sorted(amax, reverse=True)
        assert amax[-1] < amax[0]


def test_a_calibration_set_in_parts_gives_the_same_statistics(job, monkeypatch):
    whole, shares = observe_inputs(job), []
    monkeypatch.setattr(observe, "MAX_OBSERVED_VALUES", 1)  # so that every sample is a part of its own
    assert observe_inputs(job, progress=shares.append) == whole
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_what_was_observed_is_read_again(job, tmp_path, monkeypatch):
    job = CalibrationJob(job.blocks, job.source, job.schemes, job.samples, CalibrationWork(tmp_path))
    first = observe_inputs(job)
    monkeypatch.setattr(observe, "_observe", None)
    assert observe_inputs(job) == first


def test_tuned_tensors_take_the_place_of_those_of_the_checkpoint(job):
    gain = torch.from_numpy(job.source.load(f"{NORM}.layer_norm1.weight"))
    bias = torch.from_numpy(job.source.load(f"{NORM}.layer_norm1.bias"))
    before, _ = observe_inputs(job)
    after, _ = observe_inputs(job, {NORM: {"layer_norm1.weight": 2 * gain, "layer_norm1.bias": 2 * bias}})
    assert after[0].ranges[PAPER_CLIPS[0]] == pytest.approx(2 * before[0].ranges[PAPER_CLIPS[0]])
    assert after[0].entropy == pytest.approx(before[0].entropy, rel=0.01)
    assert after[-1].ranges != before[-1].ranges


@pytest.mark.parametrize("number", [2, 3])
def test_activations_that_are_too_large_are_refused_by_layer_and_sample(job, number, monkeypatch):
    """Also where the samples are observed in parts."""
    monkeypatch.setattr(observe, "MAX_OBSERVED_VALUES", 1)
    job.samples[number].pixel_values[0] = 1e38
    message = rf"^{NORM}\.self_attn\.q_proj: activations of sample {number + 1} are not finite"
    with pytest.raises(UserError, match=message):
        observe_inputs(job)
