"""prompts about each sample, flattened"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks
from qvlm_export.calibrate.blockwise.token_kinds import TokenLabel, label_tokens
from qvlm_export.calibrate.checkpoint.samples import Sample


def label_block_inputs(block: Block, blocks: ModelBlocks, prompts: Prompts) -> list[torch.Tensor]:
    """The TokenLabel of every token of every input that reaches `block`, in the order of the inputs.

    Tower and projector see the samples that have pictures, every picture's tokens being image tokens; one label for all
    of them. The decoder sees all prompts.
    """
    if block in blocks.text_layers:
        return [label_tokens(prompt, blocks.image_token_id) for prompt in flatten_prompts(prompts)[0]]
    return [torch.tensor([int(TokenLabel.IMAGE)]) for sample, *_ in prompts if len(sample.pixel_values)]


# prompts[i]: those about the pictures of sample i, sample i itself first.
Prompts = Sequence[Sequence[Sample]]


@dataclass(frozen=True)
class MixupSample(Sample):
    """A prompt about pictures whose features are mixed with those of another sample's. share: of the other's features.

    other: number of that sample, which has as many image tokens.
    """

    other: int = 0
    share: float = 0.0


def flatten_prompts(prompts: Prompts) -> tuple[list[Sample], list[int]]:
    """All prompts in order, and for each the number of the sample whose pictures it is about."""
    return [p for about in prompts for p in about], [number for number, about in enumerate(prompts) for _ in about]


def image_features_of_prompts(
    texts: Sequence[Sample],
    pictures_of: Sequence[int],
    features: Sequence[torch.Tensor],
    others: Mapping[int, torch.Tensor] | Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """The image features [image tokens, hidden] of each text. features: by `pictures_of`; others: by number of the sample
    that features are mixed with, None for the same."""
    mixed = features if others is None else others
    return [
        torch.lerp(features[own], mixed[text.other], text.share) if isinstance(text, MixupSample) else features[own]
        for text, own in zip(texts, pictures_of, strict=True)
    ]


def group_by_image_tokens(samples: Sequence[Sample], image_token_id: int) -> list[list[int]]:
    """Numbers of the samples with pictures, together where pictures can change places."""
    kinds: dict[tuple[int, int], list[int]] = {}
    for number, sample in enumerate(samples):
        if len(sample.pixel_values):
            tokens = int((sample.input_ids == image_token_id).sum())
            kinds.setdefault((len(sample.pixel_values), tokens), []).append(number)
    return list(kinds.values())
