"""Prompts that leave the model undecided, against the model run on one mixture after another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_export import make_sample, mixed_samples, open_small, plan_of

from qvlm_export.calibrate.augmentation import mixup as undecided
from qvlm_export.calibrate.augmentation.cross_questions import recombine
from qvlm_export.calibrate.augmentation.mixup import SHARES, pairs, runs_of, with_undecided
from qvlm_export.calibrate.augmentation.prompts import Mixed, flat, shown
from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.forward import final_logits, plain_step, walk_language, walk_vision
from qvlm_export.calibrate.blockwise.job import Calibration
from qvlm_export.calibrate.blockwise.resume import Work


@pytest.fixture
def job(llava) -> Calibration:
    checkpoint = open_small(llava(dtype="float32"))
    samples = [make_sample(checkpoint, words=8 + seed, images=1, seed=seed) for seed in range(4)]
    samples = [replace(sample, answer_start=len(sample.input_ids) - 3) for sample in samples]
    return Calibration(make_blocks(checkpoint.hf_config), checkpoint.source, plan_of(checkpoint, "int4"), samples)


def doubts_of(job: Calibration, text, image: torch.Tensor) -> float:
    """Of one prompt, the largest of its answer's tokens and of the one that ends it."""
    hidden = walk_language(job.blocks, job.source, [text], [image], plain_step(job.source))
    (logits,) = final_logits(job.source, hidden, job.blocks.final_epsilon)
    likely = logits[text.answer_start - 1 : len(text.input_ids) - 1].softmax(-1)
    return max(1 - sum(p**2 for p in row) for row in likely.tolist())


def test_every_question_goes_with_the_mixture_the_model_doubts_most(job: Calibration, monkeypatch: pytest.MonkeyPatch):
    features = walk_vision(job.blocks, job.source, job.samples, plain_step(job.source))
    asked = pairs(job.samples, 2, job.blocks.image_token_id, 0)
    assert len(asked) == 8
    doubts = [
        [doubts_of(job, p.text, (1 - share) * features[p.own] + share * features[p.other]) for share in SHARES]
        for p in asked
    ]
    middle = sorted(max(row) for row in doubts)[4]
    monkeypatch.setattr(undecided, "UNDECIDED", middle - 1e-6)
    monkeypatch.setattr(undecided, "MIXED_VALUES", 1)  # in as many parts as there are pairs
    alone = [[sample] for sample in job.samples]
    told: list[float] = []
    found = with_undecided(job, alone, 2, 0, told.append)
    assert told[-1] == 1.0
    assert [about[0] for about in found] == job.samples
    mixed = [text for about in found for text in about[1:]]
    wanted = [(p, row) for p, row in zip(asked, doubts, strict=True) if max(row) >= middle]
    assert len(mixed) == len(wanted) == 4
    for text, (pair, row) in zip(mixed, wanted, strict=True):
        assert isinstance(text, Mixed)
        assert text.other == pair.other
        assert text.pixel_values is pair.text.pixel_values
        assert row[SHARES.index(text.share)] == pytest.approx(max(row), abs=1e-6)


def test_features_are_mixed_as_the_prompt_says(job: Calibration):
    features = [torch.full((2, 3), float(number)) for number in range(4)]
    plain = job.samples[1]
    mixed = Mixed(plain.input_ids, plain.pixel_values, plain.answer_start, other=3, share=0.25)
    one, other = shown([plain, mixed], [1, 1], features)
    assert one is features[1]
    torch.testing.assert_close(other, torch.full((2, 3), 1.5))
    (apart,) = shown([mixed], [0], features[1:2], {3: features[0]})  # numbers of a part, and of all samples
    torch.testing.assert_close(apart, torch.full((2, 3), 0.75))


def test_a_picture_is_mixed_with_another_one_of_as_many_tokens(llava):
    checkpoint = open_small(llava())
    samples = mixed_samples(checkpoint)  # one picture, none, two, one
    token = make_blocks(checkpoint.hf_config).image_token_id
    assert {(pair.own, pair.other) for pair in pairs(samples, 4, token, 0)} == {(0, 3), (3, 0)}
    assert pairs(samples[:3], 4, token, 0) == []
    assert pairs(samples, 0, token, 0) == []


def test_what_was_measured_is_not_measured_again(job: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept = replace(job, work=Work(tmp_path))
    prompts = recombine(job.samples, 2, job.blocks.image_token_id)
    first = with_undecided(kept, prompts, 2, 0)
    assert runs_of(job, 2, 0) == (3 + 1) * 4 + 2 * len(SHARES) * 8

    def never(*_args):
        raise AssertionError

    monkeypatch.setattr(undecided, "walk_language", never)
    again = with_undecided(replace(job, work=Work(tmp_path)), prompts, 2, 0)
    assert [getattr(text, "share", 0) for text in flat(first)[0]] == [getattr(text, "share", 0) for text in flat(again)[0]]
    assert len(flat(first)[0]) > len(flat(prompts)[0])
