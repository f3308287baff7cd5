"""Calibration-set augmentation: random word replacement with words drawn by the norm of their embedding.

Clipping ranges, equalization factors and Hessians reflect only what the samples show. A question of another kind, or a word
that no sample has, can make a channel many times as large as on all samples, and a static range then clips it; or it has
energy in directions where the samples have none, into which rounding has put its errors. So texts of the samples with half
of their words replaced by other words of the vocabulary are run as well. They mean nothing and need no answer: they only
show which values the model can produce. The sensitivity of their tokens is not measured; each has the mean token weight of
the samples.

Most of a vocabulary may be words that training hardly saw, whose embeddings stayed small (Land and Bartolo 2024,
arXiv 2405.05417). So words are drawn with probability proportional to the squared norm of their embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qvlm_export.calibrate.augmentation.cross_questions import cross_pair_prompts
from qvlm_export.calibrate.checkpoint.samples import Sample

REPLACED_SHARE = 0.5  # expected share of a text's words that are replaced


def replace_words(
    samples: Sequence[Sample], count: int, sampling_weights: np.ndarray, image_token_id: int, seed: int
) -> list[tuple[Sample, int]]:
    """Up to `count` texts with random words about each sample's images, and the index of that sample.

    sampling_weights: float [vocabulary], the relative probability that each token is drawn, as `embedding_norm_weights`
    returns it. Tokens that all samples share belong to the prompt template: they are neither replaced nor drawn. Where no
    sample has any other token, no text is returned. The same seed gives the same texts.
    """
    if not count or not samples:
        return []
    template = _find_template_tokens(samples)
    words = np.setdiff1d(np.flatnonzero(sampling_weights), np.append(template, image_token_id))
    if not any(np.isin(sample.input_ids, words).any() for sample in samples):
        return []
    generator, probabilities = np.random.default_rng(seed), sampling_weights[words] / sampling_weights[words].sum()
    prompts = []
    for index, (own, *others) in enumerate(cross_pair_prompts(samples, count + 1, image_token_id, seed)):
        for text in others or [own]:
            ids = text.input_ids.copy()
            replaced = (generator.random(len(ids)) < REPLACED_SHARE) & np.isin(ids, words)
            ids[replaced] = generator.choice(words, int(replaced.sum()), p=probabilities)
            prompts.append((replace(text, input_ids=ids), index))
    return prompts


def embedding_norm_weights(embeddings: np.ndarray) -> np.ndarray:
    """Squared norm of each token's embedding, float64 [vocabulary], from embeddings float32 [vocabulary, hidden]."""
    return np.asarray(np.square(embeddings).sum(axis=1, dtype=np.float64))


def _find_template_tokens(samples: Sequence[Sample]) -> np.ndarray:
    """Ids of the tokens that every sample has, sorted."""
    ids, counts = np.unique(np.concatenate([np.unique(sample.input_ids) for sample in samples]), return_counts=True)
    return ids[counts == len(samples)]
