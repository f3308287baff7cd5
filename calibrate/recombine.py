"""More prompts from the same samples: every picture is asked other samples' questions, too.

Ranges, Gram matrices and expected tails are estimated from few samples, and deployment combines pictures and questions as
it likes. A sample is a picture and a text, so n of them hold n * n prompts. None of them needs an answer that is true:
calibration compares the model with itself. Only the decoder runs more often; what tower and projector make of a picture is
computed once. torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from calibrate.samples import Sample

# prompts[i]: those about the pictures of sample i, sample i itself first.
Prompts = Sequence[Sequence[Sample]]


@dataclass(frozen=True)
class Mixed(Sample):
    """A prompt about pictures whose features are mixed with those of another sample's. share: of the other's features.

    other: number of that sample, which has as many image tokens.
    """

    other: int = 0
    share: float = 0.0


def recombine(samples: Sequence[Sample], questions: int, image_token_id: int, seed: int = 0) -> list[list[Sample]]:
    """Up to `questions` prompts about the pictures of every sample: its own, and others' texts, each as often as others.

    Pictures change places only between samples with as many image tokens, so every prompt keeps its length; a sample
    without pictures, or with pictures unlike all others, stays alone. The same seed, the same prompts.
    """
    prompts = [[sample] for sample in samples]
    for members in interchangeable(samples, image_token_id):
        order = np.random.default_rng(seed).permutation(members).tolist()
        for place, number in enumerate(order):
            texts = {samples[number].input_ids.tobytes()}
            for other in order[place + 1 :] + order[:place]:
                if len(prompts[number]) >= questions:
                    break
                if (text := samples[other].input_ids.tobytes()) not in texts:
                    texts.add(text)
                    prompts[number].append(_asked(samples[number], samples[other]))
    return prompts


def flat(prompts: Prompts) -> tuple[list[Sample], list[int]]:
    """All prompts in order, and for each the number of the sample whose pictures it is about."""
    return [p for about in prompts for p in about], [number for number, about in enumerate(prompts) for _ in about]


def shown(
    texts: Sequence[Sample],
    pictures_of: Sequence[int],
    features: Sequence[torch.Tensor],
    others: Mapping[int, torch.Tensor] | Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """The image features [image tokens, hidden] of each text. features: by `pictures_of`; others: by number of the sample
    that features are mixed with, None for the same."""
    mixed = features if others is None else others
    return [
        torch.lerp(features[own], mixed[text.other], text.share) if isinstance(text, Mixed) else features[own]
        for text, own in zip(texts, pictures_of, strict=True)
    ]


def interchangeable(samples: Sequence[Sample], image_token_id: int) -> list[list[int]]:
    """Numbers of the samples with pictures, together where pictures can change places."""
    kinds: dict[tuple[int, int], list[int]] = {}
    for number, sample in enumerate(samples):
        if len(sample.pixel_values):
            tokens = int((sample.input_ids == image_token_id).sum())
            kinds.setdefault((len(sample.pixel_values), tokens), []).append(number)
    return list(kinds.values())


def _asked(pictures: Sample, text: Sample) -> Sample:
    return replace(text, pixel_values=pictures.pixel_values, placement=pictures.placement)
