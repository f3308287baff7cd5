"""Calibration-set augmentation: mixup of image features, selected by predictive uncertainty.

Nearly all of a quantized model's KL divergence lies in the few answer tokens that the float model is uncertain about, where
a small error changes the probabilities most, and few samples have such a token. On the line between the features
of an image with one answer and those of an image with another answer there is a mixture that is ambiguous. So every question
is asked about several mixtures of its image's features with those of another sample, and the mixture with the highest
uncertainty becomes a prompt. No prompt needs a correct answer, because calibration compares the quantized model with the
float model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from qvlm_export.calibrate.augmentation.cross_questions import cross_pair_prompts
from qvlm_export.calibrate.augmentation.prompts import MixupSample, Prompts, group_by_image_tokens
from qvlm_export.calibrate.blockwise.batching import split_by_size
from qvlm_export.calibrate.blockwise.block_loader import batched_step, open_block_loader
from qvlm_export.calibrate.blockwise.forward import load_head, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.checkpoint.samples import Sample

MIXING_SHARES = tuple(n / 9 for n in range(1, 9))  # candidate weights of the other sample's image features
MIN_UNCERTAINTY = 0.3  # Gini impurity 1 - sum p^2 at one answer token; two equally likely tokens have 0.5
MAX_MIXED_VALUES = 2**27  # limits the float32 hidden states of mixtures that are in memory at a time


@dataclass(frozen=True)
class MixupPair:
    """A question about a mixture of image features.

    text: the prompt. own: index of the sample whose images it is about. other: index of the sample they are mixed with.
    """

    text: Sample
    own: int
    other: int


def make_mixup_pairs(samples: Sequence[Sample], questions: int, image_token_id: int, seed: int) -> list[MixupPair]:
    """Up to `questions` texts about each sample's images, each paired at random with another sample.

    The other sample has the same number of image tokens. Samples for which there is no such other sample have no pairs.
    """
    generator = np.random.default_rng(seed)
    pairs = []
    same_length = {index: members for members in group_by_image_tokens(samples, image_token_id) for index in members}
    for own, prompts in enumerate(cross_pair_prompts(samples, questions, image_token_id, seed) if questions else ()):
        others = [n for n in same_length.get(own, ()) if n != own]
        pairs += [MixupPair(text, own, others[int(generator.integers(len(others)))]) for text in prompts if others]
    return pairs


def count_mixup_forwards(job: CalibrationJob, questions: int, seed: int) -> int:
    """Number of block forward passes that `add_mixup_prompts` runs, counting one for each block and image or prompt."""
    pairs = make_mixup_pairs(job.samples, questions, job.blocks.image_token_id, seed)
    images = sum(len(sample.pixel_values) for sample in job.samples) if pairs else 0
    return (len(job.blocks.vision_layers) + 1) * images + len(job.blocks.text_layers) * len(MIXING_SHARES) * len(pairs)


def add_mixup_prompts(
    job: CalibrationJob, prompts: Prompts, questions: int, seed: int, progress: Callable[[float], None] = lambda _: None
) -> Prompts:
    """The prompts about each sample, followed by mixtures whose uncertainty exceeds MIN_UNCERTAINTY.

    questions: the most texts per sample to try mixtures for; 0 adds none. progress: called with the share that is done,
    0 to 1. Uncertainties that an interrupted run has saved in the work folder are not measured again.
    """
    pairs = make_mixup_pairs(job.samples, questions, job.blocks.image_token_id, seed)
    if not pairs:
        return prompts

    def measure() -> dict[str, list[torch.Tensor]]:
        return {"uncertainties": [_measure_uncertainties(job, pairs, progress)]}

    measured = measure() if job.work is None else job.work.load_or_compute("mixup", measure)
    mixtures: dict[int, list[Sample]] = {}
    for pair, uncertainties in zip(pairs, measured["uncertainties"][0].tolist(), strict=True):
        best = max(range(len(MIXING_SHARES)), key=uncertainties.__getitem__)
        if uncertainties[best] > MIN_UNCERTAINTY:
            copied = {field.name: getattr(pair.text, field.name) for field in fields(Sample)}
            mixtures.setdefault(pair.own, []).append(MixupSample(**copied, other=pair.other, share=MIXING_SHARES[best]))
    return [[*about, *mixtures.get(index, ())] for index, about in enumerate(prompts)]


def compute_image_features(job: CalibrationJob, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """Image features of each sample by the float model's vision tower and projector, float32 [image tokens, hidden]."""
    with torch.inference_mode(), open_block_loader(job.blocks, job.source, job.device) as resident:
        features = run_vision_blocks(job.blocks, job.source, samples, batched_step(resident, job.device))
    return [one.clone() for one in features]  # autograd cannot use inference tensors


def _measure_uncertainties(
    job: CalibrationJob, pairs: Sequence[MixupPair], progress: Callable[[float], None]
) -> torch.Tensor:
    """Uncertainty of each pair at each of MIXING_SHARES, float32 [pairs, shares]; see `_compute_uncertainties`."""
    features = compute_image_features(job, job.samples)
    width = job.blocks.text_width()
    sizes = [len(pair.text.input_ids) * len(MIXING_SHARES) * width for pair in pairs]
    parts: list[torch.Tensor] = []
    for part in split_by_size(pairs, sizes, MAX_MIXED_VALUES):
        texts = [pair.text for pair in part for _ in MIXING_SHARES]
        mixed = [torch.lerp(features[pair.own], features[pair.other], share) for pair in part for share in MIXING_SHARES]
        with torch.inference_mode(), open_block_loader(job.blocks, job.source, job.device) as resident:
            hidden = run_decoder_blocks(job.blocks, job.source, texts, mixed, batched_step(resident, job.device))
        parts += [_compute_uncertainties(job, texts, hidden).reshape(len(part), len(MIXING_SHARES))]
        progress(sum(map(len, parts)) / len(pairs))
    return torch.cat(parts)


def _compute_uncertainties(job: CalibrationJob, texts: Sequence[Sample], hidden: Sequence[torch.Tensor]) -> torch.Tensor:
    """The largest Gini impurity 1 - sum p^2 among the answer tokens of each text, float32 [texts].

    hidden: decoder output of each text, [1, S, hidden].
    """
    starts = [max(text.answer_start - 1, 0) for text in texts]
    answers = [h[:, n : max(n + 1, len(t.input_ids) - 1)] for n, t, h in zip(starts, texts, hidden, strict=True)]
    head = load_head(job.source, job.blocks.final_epsilon)
    with torch.inference_mode():
        logits = [head.logits(answer[0]) for answer in answers]
    return torch.tensor([float((1 - one.softmax(-1).square().sum(-1)).max()) for one in logits])
