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

from qvlm_export.calibrate.augmentation.cross_questions import recombine
from qvlm_export.calibrate.augmentation.prompts import Mixed, Prompts, interchangeable
from qvlm_export.calibrate.blockwise.batching import parted
from qvlm_export.calibrate.blockwise.forward import final_logits, walk_language, walk_vision
from qvlm_export.calibrate.blockwise.job import Calibration
from qvlm_export.calibrate.blockwise.offload import batched_step, residents
from qvlm_export.calibrate.checkpoint.samples import Sample

SHARES = tuple(n / 9 for n in range(1, 9))  # of the other picture's features, each tried
UNDECIDED = 0.3  # of 1 - sum p^2 at some answer token; two answers alike have 0.5
MIXED_VALUES = 2**27  # float32 hidden states of mixtures at a time


@dataclass(frozen=True)
class Pair:
    """A question, the number of the sample whose pictures it is about, and of the one they are mixed with."""

    text: Sample
    own: int
    other: int


def pairs(samples: Sequence[Sample], questions: int, image_token_id: int, seed: int) -> list[Pair]:
    """Up to `questions` texts about each sample's pictures, each with another sample's. Without another one: none."""
    draw = np.random.default_rng(seed)
    found = []
    alike = {number: members for members in interchangeable(samples, image_token_id) for number in members}
    for own, about in enumerate(recombine(samples, questions, image_token_id, seed) if questions else ()):
        others = [n for n in alike.get(own, ()) if n != own]
        found += [Pair(text, own, others[int(draw.integers(len(others)))]) for text in about if others]
    return found


def runs_of(job: Calibration, questions: int, seed: int) -> int:
    """How many pictures and prompts go through a block, once forwards."""
    found = pairs(job.samples, questions, job.blocks.image_token_id, seed)
    pictures = sum(len(sample.pixel_values) for sample in job.samples) if found else 0
    return (len(job.blocks.vision_layers) + 1) * pictures + len(job.blocks.text_layers) * len(SHARES) * len(found)


def with_undecided(
    job: Calibration, prompts: Prompts, questions: int, seed: int, progress: Callable[[float], None] = lambda _: None
) -> Prompts:
    """The prompts about each sample, and behind them mixtures that leave the model undecided. 0 questions: none.

    What an interrupted run measured is not measured again. progress: is told which share is done.
    """
    found = pairs(job.samples, questions, job.blocks.image_token_id, seed)
    if not found:
        return prompts

    def measured() -> dict[str, list[torch.Tensor]]:
        return {"doubts": [_doubts(job, found, progress)]}

    kept = measured() if job.work is None else job.work.remembered("undecided", measured)
    more: dict[int, list[Sample]] = {}
    for pair, doubts in zip(found, kept["doubts"][0].tolist(), strict=True):
        best = max(range(len(SHARES)), key=doubts.__getitem__)
        if doubts[best] > UNDECIDED:
            copied = {field.name: getattr(pair.text, field.name) for field in fields(Sample)}
            more.setdefault(pair.own, []).append(Mixed(**copied, other=pair.other, share=SHARES[best]))
    return [[*about, *more.get(number, ())] for number, about in enumerate(prompts)]


def features_of(job: Calibration, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """What the float model's tower and projector make of the pictures of each sample, float32 [image tokens, hidden]."""
    with torch.inference_mode(), residents(job.blocks, job.source, job.device) as resident:
        features = walk_vision(job.blocks, job.source, samples, batched_step(resident, job.device))
    return [one.clone() for one in features]  # as autograd takes no inference tensors


def _doubts(job: Calibration, found: Sequence[Pair], progress: Callable[[float], None]) -> torch.Tensor:
    """The largest 1 - sum p^2 of an answer token of each pair, float32 [pairs, SHARES]."""
    features = features_of(job, job.samples)
    width = job.blocks.text_width()
    sizes = [len(pair.text.input_ids) * len(SHARES) * width for pair in found]
    parts: list[torch.Tensor] = []
    for part in parted(found, sizes, MIXED_VALUES):
        texts = [pair.text for pair in part for _ in SHARES]
        mixed = [torch.lerp(features[pair.own], features[pair.other], share) for pair in part for share in SHARES]
        with torch.inference_mode(), residents(job.blocks, job.source, job.device) as resident:
            hidden = walk_language(job.blocks, job.source, texts, mixed, batched_step(resident, job.device))
        parts += [_doubt(job, texts, hidden).reshape(len(part), len(SHARES))]
        progress(sum(map(len, parts)) / len(found))
    return torch.cat(parts)


def _doubt(job: Calibration, texts: Sequence[Sample], hidden: Sequence[torch.Tensor]) -> torch.Tensor:
    firsts = [max(text.answer_start - 1, 0) for text in texts]
    answers = [h[:, n : max(n + 1, len(t.input_ids) - 1)] for n, t, h in zip(firsts, texts, hidden, strict=True)]
    logits = final_logits(job.source, answers, job.blocks.final_epsilon)
    return torch.tensor([float((1 - one.softmax(-1).square().sum(-1)).max()) for one in logits])
