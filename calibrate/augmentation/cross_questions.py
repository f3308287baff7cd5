"""More prompts from the same samples: every picture is asked other samples' questions, too.

Ranges, Gram matrices and expected tails are estimated from few samples, and deployment combines pictures and questions as
it likes. A sample is a picture and a text, so n of them hold n * n prompts. None of them needs an answer that is true:
calibration compares the model with itself. Only the decoder runs more often; what tower and projector make of a picture is
computed once. torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qvlm_export.calibrate.augmentation.prompts import group_by_image_tokens
from qvlm_export.calibrate.checkpoint.samples import Sample


def cross_pair_prompts(samples: Sequence[Sample], questions: int, image_token_id: int, seed: int = 0) -> list[list[Sample]]:
    """Up to `questions` prompts about the pictures of every sample: its own, and others' texts, each as often as others.

    Pictures change places only between samples with as many image tokens, so every prompt keeps its length; a sample
    without pictures, or with pictures unlike all others, stays alone. The same seed, the same prompts.
    """
    prompts = [[sample] for sample in samples]
    for members in group_by_image_tokens(samples, image_token_id):
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


def _asked(pictures: Sample, text: Sample) -> Sample:
    return replace(text, pixel_values=pictures.pixel_values, placement=pictures.placement)
