"""Prompts of words drawn anew: how far activations go where no sample leads. numpy.

Ranges and folding factors hold for what the samples show. A question of a kind that none of them asks can make a channel
many times as large as on all samples, and a static range clips it: that token's answer is lost, where rounding costs every
token a little. So texts of the samples, half of their words replaced by others of theirs, are run too. They mean nothing and
need no answer: they only say which values the model can make. What errors at their tokens do to the answers is not asked, so
that these count the least that a token counts (`way_back.LEAST`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from calibrate.recombine import recombine
from calibrate.samples import Sample

RATE = 0.5  # of the words of a text


def scrambled(samples: Sequence[Sample], count: int, image_token_id: int, seed: int) -> list[tuple[Sample, int]]:
    """Up to `count` texts about each sample's pictures, and that sample's number. The same seed, the same prompts.

    Words are the tokens that some samples have and others do not: what all of them have is the template.
    """
    if not count or not samples or not len(words := _words(samples, image_token_id)):
        return []
    draw = np.random.default_rng(seed)
    found = []
    for number, (own, *others) in enumerate(recombine(samples, count + 1, image_token_id, seed)):
        for text in others or [own]:
            ids = text.input_ids.copy()
            replaced = (draw.random(len(ids)) < RATE) & np.isin(ids, words)
            ids[replaced] = draw.choice(words, int(replaced.sum()))
            found.append((replace(text, input_ids=ids), number))
    return found


def _words(samples: Sequence[Sample], image_token_id: int) -> np.ndarray:
    """Sorted, each once."""
    ids, counts = np.unique(np.concatenate([np.unique(sample.input_ids) for sample in samples]), return_counts=True)
    return ids[(counts < len(samples)) & (ids != image_token_id)]
