"""Random word replacement keeps the template and the images, draws by embedding norm, and widens activation ranges."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_export import mixed_samples, open_small, schemes_of

from qvlm_export.calibrate.augmentation.random_words import REPLACED_SHARE, embedding_norm_weights, replace_words
from qvlm_export.calibrate.blockwise.blocks import load_finite, make_blocks
from qvlm_export.calibrate.blockwise.forward import EMBEDDING
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, CalibratedWriter
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.quantization.config import FAST, FULL

IMAGE, VOCABULARY = 4, 5000
WEIGHTS = np.ones(VOCABULARY)
IMAGE_PIXELS = np.zeros((1, 3, 2, 2), np.float32)


def sample(words: list[int], number: int = 0) -> Sample:
    """BOS, two image tokens, the words, and a token 9 that ends every text. All pixels are `number`."""
    return Sample(np.array([1, IMAGE, IMAGE, *words, 9]), IMAGE_PIXELS + number, 4 + len(words))


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(10, 40), min_size=1, max_size=12), min_size=2, max_size=8),
    count=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_only_words_that_not_all_samples_share_are_replaced(texts: list[list[int]], count: int, seed: int) -> None:
    samples = [sample(words, number) for number, words in enumerate(texts)]
    prompts = replace_words(samples, count, WEIGHTS, IMAGE, seed)
    shared = set(texts[0]).intersection(*texts[1:])
    originals = {(len(words), tuple(w if w in shared else 0 for w in words)) for words in texts}
    for prompt, number in prompts:
        ids = prompt.input_ids
        assert ids[:3].tolist() == [1, IMAGE, IMAGE]
        assert ids[-1] == 9
        words = ids[3:-1].tolist()
        assert set(words) - shared <= set(range(VOCABULARY)) - {1, IMAGE, 9}
        assert prompt.answer_start == len(ids)
        assert (prompt.pixel_values == number).all()
        assert any(
            length == len(words) and all(not fixed or fixed == word for fixed, word in zip(pattern, words, strict=True))
            for length, pattern in originals
        )
    repeated = replace_words(samples, count, WEIGHTS, IMAGE, seed)
    assert [p.input_ids.tolist() for p, _ in prompts] == [p.input_ids.tolist() for p, _ in repeated]


def test_half_of_the_words_are_replaced() -> None:
    samples = [sample(np.random.default_rng(n).integers(10, 5000, 200).tolist(), n) for n in range(8)]
    prompts = replace_words(samples, 4, WEIGHTS, IMAGE, 0)
    assert len(prompts) == 8 * 4
    texts = np.stack([s.input_ids for s in samples])
    unchanged = [(prompt.input_ids == texts).mean(1).max() for prompt, _ in prompts]
    assert 1 - np.mean(unchanged) == pytest.approx(REPLACED_SHARE, abs=0.05)
    assert len({prompt.input_ids.tobytes() for prompt, _ in prompts}) == len(prompts)
    new = np.setdiff1d(np.concatenate([prompt.input_ids for prompt, _ in prompts]), texts)
    assert len(new) > VOCABULARY // 4


def test_words_are_drawn_in_proportion_to_their_squared_embedding_norm() -> None:
    embeddings = np.zeros((VOCABULARY, 3), np.float32)
    embeddings[50], embeddings[60] = (0, 1, 0), (2, 0, 2)
    embeddings[10:12] = 1
    samples = [sample([10 + n % 2] * 300, n) for n in range(8)]
    prompts = replace_words(samples, 2, embedding_norm_weights(embeddings), IMAGE, 0)
    words, counts = np.unique(np.concatenate([prompt.input_ids[3:-1] for prompt, _ in prompts]), return_counts=True)
    assert words.tolist() == [10, 11, 50, 60]  # words whose embedding is zero are never drawn
    assert counts[3] / counts[2] == pytest.approx(8, rel=0.2)


def test_no_prompts_are_made_of_identical_texts_or_for_a_count_of_zero() -> None:
    assert replace_words([sample([11, 12])] * 3, 4, WEIGHTS, IMAGE, 0) == []
    assert replace_words([sample([11, 12]), sample([13])], 0, WEIGHTS, IMAGE, 0) == []
    assert replace_words([], 4, WEIGHTS, IMAGE, 0) == []


def test_activation_ranges_cover_words_that_no_sample_has(llava, tmp_path, monkeypatch) -> None:
    """Prompts with random words count for the ranges. Here the embeddings of other words have a single nonzero channel."""
    checkpoint = open_small(llava())
    blocks, schemes, samples = make_blocks(checkpoint.hf_config), schemes_of(checkpoint, "int8"), mixed_samples(checkpoint)
    words = torch.randint(10, 60, (len(samples), 6), generator=torch.Generator().manual_seed(0)).numpy()
    samples = [
        replace(s, input_ids=np.concatenate([s.input_ids, own]), answer_start=len(s.input_ids) + 3)
        for s, own in zip(samples, words, strict=True)
    ]
    load, sample_words = checkpoint.source.load, np.unique(np.concatenate([s.input_ids for s in samples]))

    def load_with_outliers(name: str) -> np.ndarray:
        array = load(name)
        if name == EMBEDDING:
            others = np.setdiff1d(np.arange(len(array)), sample_words)
            array[others] = 0
            array[others, others % array.shape[1]] = 1
        return array

    monkeypatch.setattr(checkpoint.source, "load", load_with_outliers)
    weights = embedding_norm_weights(load_finite(checkpoint.source, EMBEDDING).numpy())
    job, scales = CalibrationJob(blocks, checkpoint.source, schemes, samples, strict=True), {}
    for count in (0, 6):
        writer = CalibratedWriter(tmp_path / str(count))
        summary = calibrate_search(
            job, writer, lambda *_: None, replace(FAST, equalization="none", random_word_prompts=count)
        )
        writer.finish(checkpoint.config_json, summary)
        assert summary["random_words"] == len(replace_words(samples, count, weights, blocks.image_token_id, 0))
        assert summary["prompts"] == len(samples) + summary["random_words"]
        calibrated = CalibratedCheckpoint(tmp_path / str(count))
        scales[count] = calibrated.input_scale("language_model.model.layers.0.self_attn.q_proj")
    assert summary["random_words"] > 0
    assert scales[6] > 1.3 * scales[0]
    assert FULL.random_word_prompts > 0
