"""Texts with words drawn anew keep the template, the pictures and their places, and reach the search."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_export import mixed_samples, open_small, plan_of

from qvlm_export.calibrate.augmentation.random_words import REPLACED_SHARE, embedding_norm_weights, replace_words
from qvlm_export.calibrate.blockwise.blocks import load_finite, make_blocks
from qvlm_export.calibrate.blockwise.forward import EMBEDDING
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, CalibratedWriter
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.quantization.config import FAST, FULL

IMAGE, VOCABULARY = 4, 5000
ODDS = np.ones(VOCABULARY)
PICTURE = np.zeros((1, 3, 2, 2), np.float32)


def sample(words: list[int], number: int = 0) -> Sample:
    """BOS, two image tokens, words, a colon."""
    return Sample(np.array([1, IMAGE, IMAGE, *words, 9]), PICTURE + number, 4 + len(words))


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(10, 40), min_size=1, max_size=12), min_size=2, max_size=8),
    count=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_only_words_change(texts: list[list[int]], count: int, seed: int) -> None:
    samples = [sample(words, number) for number, words in enumerate(texts)]
    found = replace_words(samples, count, ODDS, IMAGE, seed)
    everywhere = set(texts[0]).intersection(*texts[1:])
    originals = {(len(words), tuple(w if w in everywhere else 0 for w in words)) for words in texts}
    for prompt, number in found:
        ids = prompt.input_ids
        assert ids[:3].tolist() == [1, IMAGE, IMAGE]
        assert ids[-1] == 9
        words = ids[3:-1].tolist()
        assert set(words) - everywhere <= set(range(VOCABULARY)) - {1, IMAGE, 9}
        assert prompt.answer_start == len(ids)
        assert (prompt.pixel_values == number).all()
        assert any(
            length == len(words) and all(not kept or kept == word for kept, word in zip(shape, words, strict=True))
            for length, shape in originals
        )
    again = replace_words(samples, count, ODDS, IMAGE, seed)
    assert [p.input_ids.tolist() for p, _ in found] == [p.input_ids.tolist() for p, _ in again]


def test_half_of_the_words_are_drawn_anew() -> None:
    samples = [sample(np.random.default_rng(n).integers(10, 5000, 200).tolist(), n) for n in range(8)]
    found = replace_words(samples, 4, ODDS, IMAGE, 0)
    assert len(found) == 8 * 4
    texts = np.stack([s.input_ids for s in samples])
    kept = [(prompt.input_ids == texts).mean(1).max() for prompt, _ in found]
    assert 1 - np.mean(kept) == pytest.approx(REPLACED_SHARE, abs=0.05)
    assert len({prompt.input_ids.tobytes() for prompt, _ in found}) == len(found)
    new = np.setdiff1d(np.concatenate([prompt.input_ids for prompt, _ in found]), texts)  # of the model's vocabulary
    assert len(new) > VOCABULARY // 4


def test_words_are_drawn_by_the_size_of_their_embedding() -> None:
    embeddings = np.zeros((VOCABULARY, 3), np.float32)
    embeddings[50], embeddings[60] = (0, 1, 0), (2, 0, 2)
    embeddings[10:12] = 1
    samples = [sample([10 + n % 2] * 300, n) for n in range(8)]
    found = replace_words(samples, 2, embedding_norm_weights(embeddings), IMAGE, 0)
    words, counts = np.unique(np.concatenate([prompt.input_ids[3:-1] for prompt, _ in found]), return_counts=True)
    assert words.tolist() == [10, 11, 50, 60]  # those without an embedding never
    assert counts[3] / counts[2] == pytest.approx(8, rel=0.2)


def test_where_all_texts_are_alike_there_are_no_words() -> None:
    assert replace_words([sample([11, 12])] * 3, 4, ODDS, IMAGE, 0) == []
    assert replace_words([sample([11, 12]), sample([13])], 0, ODDS, IMAGE, 0) == []
    assert replace_words([], 4, ODDS, IMAGE, 0) == []


def test_ranges_cover_words_that_no_sample_has(llava, tmp_path, monkeypatch) -> None:
    """They walk with the others and are no part of the record's errors. Here such words have one channel alone."""
    checkpoint = open_small(llava())
    blocks, plan, samples = make_blocks(checkpoint.hf_config), plan_of(checkpoint, "int8"), mixed_samples(checkpoint)
    words = torch.randint(10, 60, (len(samples), 6), generator=torch.Generator().manual_seed(0)).numpy()
    samples = [
        replace(s, input_ids=np.concatenate([s.input_ids, own]), answer_start=len(s.input_ids) + 3)
        for s, own in zip(samples, words, strict=True)
    ]
    load, seen = checkpoint.source.load, np.unique(np.concatenate([s.input_ids for s in samples]))

    def planted(name: str) -> np.ndarray:
        array = load(name)
        if name == EMBEDDING:
            others = np.setdiff1d(np.arange(len(array)), seen)
            array[others] = 0
            array[others, others % array.shape[1]] = 1
        return array

    monkeypatch.setattr(checkpoint.source, "load", planted)
    odds = embedding_norm_weights(load_finite(checkpoint.source, EMBEDDING).numpy())
    job, scales = CalibrationJob(blocks, checkpoint.source, plan, samples), {}
    for count in (0, 6):
        writer = CalibratedWriter(tmp_path / str(count))
        summary = calibrate_search(
            job, writer, lambda *_: None, replace(FAST, equalization="none", random_word_prompts=count)
        )
        writer.finish(checkpoint.config_json, summary)
        assert summary["scrambled"] == len(replace_words(samples, count, odds, blocks.image_token_id, 0))
        assert summary["prompts"] == len(samples) + summary["scrambled"]
        calibrated = CalibratedCheckpoint(tmp_path / str(count))
        scales[count] = calibrated.input_scale("language_model.model.layers.0.self_attn.q_proj")
    assert summary["scrambled"] > 0
    assert scales[6] > 1.3 * scales[0]
    assert FULL.random_word_prompts > 0
