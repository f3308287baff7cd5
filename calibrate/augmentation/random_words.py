"""Prompts of words drawn anew: where activations go that no sample leads to. numpy.

Ranges, folding factors and Gram matrices hold for what the samples show. A question of a kind that none of them asks, or a
word that none of them has, can make a channel many times as large as on all samples, and a static range clips it; or it has
energy in directions where the samples have none, into which rounding has put its errors. So texts of the samples, half of
their words replaced by others of the model's vocabulary, are run too. They mean nothing and need no answer: they only say
which values the model can make. What errors at their tokens do to the answers is not asked, so each counts as
much as a token of the samples does on average.

Most of a vocabulary may be words that training hardly saw, whose embeddings stayed small (Land and Bartolo 2024,
arXiv 2405.05417). So words are drawn by the squared norm of their embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qvlm_export.calibrate.augmentation.cross_questions import cross_pair_prompts
from qvlm_export.calibrate.checkpoint.samples import Sample

REPLACED_SHARE = 0.5  # of the words of a text


def replace_words(
    samples: Sequence[Sample], count: int, odds: np.ndarray, image_token_id: int, seed: int
) -> list[tuple[Sample, int]]:
    """Up to `count` texts about each sample's pictures, and that sample's number. The same seed, the same prompts.

    odds: float [vocabulary], how likely each token is drawn; see `embedding_norm_weights`. What all samples have is the
    template: it stays,
    and is not drawn.
    """
    if not count or not samples:
        return []
    template = _template(samples)
    words = np.setdiff1d(np.flatnonzero(odds), np.append(template, image_token_id))
    if not any(np.isin(sample.input_ids, words).any() for sample in samples):
        return []
    draw, shares = np.random.default_rng(seed), odds[words] / odds[words].sum()
    found = []
    for number, (own, *others) in enumerate(cross_pair_prompts(samples, count + 1, image_token_id, seed)):
        for text in others or [own]:
            ids = text.input_ids.copy()
            replaced = (draw.random(len(ids)) < REPLACED_SHARE) & np.isin(ids, words)
            ids[replaced] = draw.choice(words, int(replaced.sum()), p=shares)
            found.append((replace(text, input_ids=ids), number))
    return found


def embedding_norm_weights(embeddings: np.ndarray) -> np.ndarray:
    """What `replace_words` draws by, float64 [vocabulary]. embeddings: float32 [vocabulary, hidden]."""
    return np.asarray(np.square(embeddings).sum(axis=1, dtype=np.float64))


def _template(samples: Sequence[Sample]) -> np.ndarray:
    """The tokens that every sample has, sorted."""
    ids, counts = np.unique(np.concatenate([np.unique(sample.input_ids) for sample in samples]), return_counts=True)
    return ids[counts == len(samples)]
