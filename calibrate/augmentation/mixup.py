"""Prompts between two answers, made of the samples: a mixture of two pictures at which the model does not know. torch.

Nearly all of a quantized model's KL divergence is at the few tokens that the float model is undecided about, where a little
noise turns the odds, and few samples have such a token. But between a picture with one answer and a picture
with another lies one with both. So every question is also asked of mixtures of its picture's features with another one's,
and the mixture that the model is least sure about becomes a prompt. Nothing need be true about it: calibration compares
the model with itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from qvlm_export.calibrate.augmentation.cross_questions import cross_pair_prompts
from qvlm_export.calibrate.augmentation.prompts import MixupSample, Prompts, group_by_image_tokens
from qvlm_export.calibrate.blockwise.batching import split_by_size
from qvlm_export.calibrate.blockwise.forward import load_head, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.blockwise.offload import batched_step, open_block_loader
from qvlm_export.calibrate.checkpoint.samples import Sample

MIXING_SHARES = tuple(n / 9 for n in range(1, 9))  # of the other picture's features, each tried
MIN_UNCERTAINTY = 0.3  # of 1 - sum p^2 at some answer token; two answers alike have 0.5
MAX_MIXED_VALUES = 2**27  # float32 hidden states of mixtures at a time


@dataclass(frozen=True)
class MixupPair:
    """A question, the number of the sample whose pictures it is about, and of the one they are mixed with."""

    text: Sample
    own: int
    other: int


def make_mixup_pairs(samples: Sequence[Sample], questions: int, image_token_id: int, seed: int) -> list[MixupPair]:
    """Up to `questions` texts about each sample's pictures, each with another sample's. Without another one: none."""
    draw = np.random.default_rng(seed)
    found = []
    alike = {number: members for members in group_by_image_tokens(samples, image_token_id) for number in members}
    for own, about in enumerate(cross_pair_prompts(samples, questions, image_token_id, seed) if questions else ()):
        others = [n for n in alike.get(own, ()) if n != own]
        found += [MixupPair(text, own, others[int(draw.integers(len(others)))]) for text in about if others]
    return found


def count_mixup_forwards(job: CalibrationJob, questions: int, seed: int) -> int:
    """How many pictures and prompts go through a block, once forwards."""
    found = make_mixup_pairs(job.samples, questions, job.blocks.image_token_id, seed)
    pictures = sum(len(sample.pixel_values) for sample in job.samples) if found else 0
    return (len(job.blocks.vision_layers) + 1) * pictures + len(job.blocks.text_layers) * len(MIXING_SHARES) * len(found)


def add_mixup_prompts(
    job: CalibrationJob, prompts: Prompts, questions: int, seed: int, progress: Callable[[float], None] = lambda _: None
) -> Prompts:
    """The prompts about each sample, and behind them mixtures that leave the model undecided. 0 questions: none.

    What an interrupted run measured is not measured again. progress: is told which share is done.
    """
    found = make_mixup_pairs(job.samples, questions, job.blocks.image_token_id, seed)
    if not found:
        return prompts

    def measured() -> dict[str, list[torch.Tensor]]:
        return {"doubts": [_doubts(job, found, progress)]}

    kept = measured() if job.work is None else job.work.load_or_compute("undecided", measured)
    more: dict[int, list[Sample]] = {}
    for pair, doubts in zip(found, kept["doubts"][0].tolist(), strict=True):
        best = max(range(len(MIXING_SHARES)), key=doubts.__getitem__)
        if doubts[best] > MIN_UNCERTAINTY:
            copied = {field.name: getattr(pair.text, field.name) for field in fields(Sample)}
            more.setdefault(pair.own, []).append(MixupSample(**copied, other=pair.other, share=MIXING_SHARES[best]))
    return [[*about, *more.get(number, ())] for number, about in enumerate(prompts)]


def compute_image_features(job: CalibrationJob, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """What the float model's tower and projector make of the pictures of each sample, float32 [image tokens, hidden]."""
    with torch.inference_mode(), open_block_loader(job.blocks, job.source, job.device) as resident:
        features = run_vision_blocks(job.blocks, job.source, samples, batched_step(resident, job.device))
    return [one.clone() for one in features]  # as autograd takes no inference tensors


def _doubts(job: CalibrationJob, found: Sequence[MixupPair], progress: Callable[[float], None]) -> torch.Tensor:
    """The largest 1 - sum p^2 of an answer token of each pair, float32 [pairs, SHARES]."""
    features = compute_image_features(job, job.samples)
    width = job.blocks.text_width()
    sizes = [len(pair.text.input_ids) * len(MIXING_SHARES) * width for pair in found]
    parts: list[torch.Tensor] = []
    for part in split_by_size(found, sizes, MAX_MIXED_VALUES):
        texts = [pair.text for pair in part for _ in MIXING_SHARES]
        mixed = [torch.lerp(features[pair.own], features[pair.other], share) for pair in part for share in MIXING_SHARES]
        with torch.inference_mode(), open_block_loader(job.blocks, job.source, job.device) as resident:
            hidden = run_decoder_blocks(job.blocks, job.source, texts, mixed, batched_step(resident, job.device))
        parts += [_doubt(job, texts, hidden).reshape(len(part), len(MIXING_SHARES))]
        progress(sum(map(len, parts)) / len(found))
    return torch.cat(parts)


def _doubt(job: CalibrationJob, texts: Sequence[Sample], hidden: Sequence[torch.Tensor]) -> torch.Tensor:
    firsts = [max(text.answer_start - 1, 0) for text in texts]
    answers = [h[:, n : max(n + 1, len(t.input_ids) - 1)] for n, t, h in zip(firsts, texts, hidden, strict=True)]
    head = load_head(job.source, job.blocks.final_epsilon)
    with torch.inference_mode():
        logits = [head.logits(answer[0]) for answer in answers]
    return torch.tensor([float((1 - one.softmax(-1).square().sum(-1)).max()) for one in logits])
