"""Mixup of image features, compared with a slow reference that runs the model on one mixture after another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_export import make_sample, mixed_samples, open_small, schemes_of

from qvlm_export.calibrate.augmentation import mixup
from qvlm_export.calibrate.augmentation.cross_questions import cross_pair_prompts
from qvlm_export.calibrate.augmentation.mixup import MIXING_SHARES, add_mixup_prompts, count_mixup_forwards, make_mixup_pairs
from qvlm_export.calibrate.augmentation.prompts import MixupSample, flatten_prompts, image_features_of_prompts
from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.forward import float_step, load_head, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.blockwise.resume import CalibrationWork


@pytest.fixture
def job(llava) -> CalibrationJob:
    checkpoint = open_small(llava(dtype="float32"))
    samples = [make_sample(checkpoint, words=8 + seed, images=1, seed=seed) for seed in range(4)]
    samples = [replace(sample, answer_start=len(sample.input_ids) - 3) for sample in samples]
    return CalibrationJob(make_blocks(checkpoint.hf_config), checkpoint.source, schemes_of(checkpoint, "int4"), samples)


def uncertainty_of(job: CalibrationJob, text, image: torch.Tensor) -> float:
    """The largest 1 - sum p^2 among the answer tokens of one prompt. image: its features [image tokens, hidden]."""
    hidden = run_decoder_blocks(job.blocks, job.source, [text], [image], float_step(job.source))
    logits = load_head(job.source, job.blocks.final_epsilon).logits(hidden[0][0])
    probabilities = logits[text.answer_start - 1 : len(text.input_ids) - 1].softmax(-1)
    return max(1 - sum(p**2 for p in row) for row in probabilities.tolist())


def test_each_question_gets_its_mixture_of_highest_uncertainty(job: CalibrationJob, monkeypatch: pytest.MonkeyPatch):
    features = run_vision_blocks(job.blocks, job.source, job.samples, float_step(job.source))
    pairs = make_mixup_pairs(job.samples, 2, job.blocks.image_token_id, 0)
    assert len(pairs) == 8
    uncertainties = [
        [uncertainty_of(job, p.text, (1 - share) * features[p.own] + share * features[p.other]) for share in MIXING_SHARES]
        for p in pairs
    ]
    median = sorted(max(row) for row in uncertainties)[4]
    monkeypatch.setattr(mixup, "MIN_UNCERTAINTY", median - 1e-6)
    monkeypatch.setattr(mixup, "MAX_MIXED_VALUES", 1)  # so that every pair is a part of its own
    alone = [[sample] for sample in job.samples]
    reported: list[float] = []
    prompts = add_mixup_prompts(job, alone, 2, 0, reported.append)
    assert reported[-1] == 1.0
    assert [about[0] for about in prompts] == job.samples
    mixed = [text for about in prompts for text in about[1:]]
    expected = [(p, row) for p, row in zip(pairs, uncertainties, strict=True) if max(row) >= median]
    assert len(mixed) == len(expected) == 4
    for text, (pair, row) in zip(mixed, expected, strict=True):
        assert isinstance(text, MixupSample)
        assert text.other == pair.other
        assert text.pixel_values is pair.text.pixel_values
        assert row[MIXING_SHARES.index(text.share)] == pytest.approx(max(row), abs=1e-6)


def test_image_features_are_mixed_by_the_share_of_the_prompt(job: CalibrationJob):
    features = [torch.full((2, 3), float(number)) for number in range(4)]
    plain = job.samples[1]
    mixed = MixupSample(plain.input_ids, plain.pixel_values, plain.answer_start, other=3, share=0.25)
    one, other = image_features_of_prompts([plain, mixed], [1, 1], features)
    assert one is features[1]
    torch.testing.assert_close(other, torch.full((2, 3), 1.5))
    # Own features are indexed within a part of the samples, those of the other sample within all samples.
    (partial,) = image_features_of_prompts([mixed], [0], features[1:2], {3: features[0]})
    torch.testing.assert_close(partial, torch.full((2, 3), 0.75))


def test_images_are_mixed_only_with_images_of_equally_many_tokens(llava):
    checkpoint = open_small(llava())
    samples = mixed_samples(checkpoint)  # with one image, none, two, one
    token = make_blocks(checkpoint.hf_config).image_token_id
    assert {(pair.own, pair.other) for pair in make_mixup_pairs(samples, 4, token, 0)} == {(0, 3), (3, 0)}
    assert make_mixup_pairs(samples[:3], 4, token, 0) == []
    assert make_mixup_pairs(samples, 0, token, 0) == []


def test_saved_uncertainties_are_not_measured_again(job: CalibrationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    resumable = replace(job, work=CalibrationWork(tmp_path))
    prompts = cross_pair_prompts(job.samples, 2, job.blocks.image_token_id)
    first = add_mixup_prompts(resumable, prompts, 2, 0)
    assert count_mixup_forwards(job, 2, 0) == (3 + 1) * 4 + 2 * len(MIXING_SHARES) * 8

    def fail(*_args):
        raise AssertionError

    monkeypatch.setattr(mixup, "run_decoder_blocks", fail)
    second = add_mixup_prompts(replace(job, work=CalibrationWork(tmp_path)), prompts, 2, 0)
    assert [getattr(text, "share", 0) for text in flatten_prompts(first)[0]] == [
        getattr(text, "share", 0) for text in flatten_prompts(second)[0]
    ]
    assert len(flatten_prompts(first)[0]) > len(flatten_prompts(prompts)[0])
