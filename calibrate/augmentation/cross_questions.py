"""Calibration-set augmentation: cross-pairing of images and questions.

A sample is an image and a text, so n samples hold n * n prompts. Clipping ranges, Hessians and the tails of the
expected-error model are estimated from few samples, while deployment combines images and questions freely. No prompt needs
a correct answer, because calibration compares the quantized model with the float model. Only the decoder runs more often:
the vision tower and projector compute the features of an image once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qvlm_export.calibrate.augmentation.prompts import group_by_image_tokens
from qvlm_export.calibrate.checkpoint.samples import Sample


def cross_pair_prompts(samples: Sequence[Sample], questions: int, image_token_id: int, seed: int = 0) -> list[list[Sample]]:
    """Up to `questions` prompts about the images of every sample: its own text first, then texts of other samples.

    Every text is used equally often. Images are exchanged only between samples with the same number of image tokens, so
    every prompt keeps its length; a sample without images, or whose images match no other sample's, keeps its own text only.
    The same seed gives the same prompts.
    """
    prompts = [[sample] for sample in samples]
    for members in group_by_image_tokens(samples, image_token_id):
        order = np.random.default_rng(seed).permutation(members).tolist()
        for position, index in enumerate(order):
            used_texts = {samples[index].input_ids.tobytes()}
            for other in order[position + 1 :] + order[:position]:
                if len(prompts[index]) >= questions:
                    break
                if (text := samples[other].input_ids.tobytes()) not in used_texts:
                    used_texts.add(text)
                    prompts[index].append(_combine(samples[index], samples[other]))
    return prompts


def _combine(image_sample: Sample, text_sample: Sample) -> Sample:
    """The text of one sample about the images of the other."""
    return replace(text_sample, pixel_values=image_sample.pixel_values, placement=image_sample.placement)
