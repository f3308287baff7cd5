"""Prompts of the augmented calibration set: their order, their image features, their token labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.quantization.config import SearchConfig
from qvlm_export.calibrate.quantization.tokens import TokenLabel, label_tokens

# Multiplications of the decoder's weights with the samples' tokens, beyond which no prompts are added to the samples. They
# would make the calibration take many times as long, which only small models can afford.
MAX_SAMPLE_PRODUCTS = 3e10
# prompts[i] holds the prompts about the images of sample i; the first of them is sample i itself.
Prompts = Sequence[Sequence[Sample]]


def limit_prompts(config: SearchConfig, blocks: ModelBlocks, samples: Sequence[Sample]) -> SearchConfig:
    """What is done for this model: `config` itself, or where the decoder is too large for more prompts, `config.large`."""
    weights = sum(parameter.numel() for block in blocks.text_layers for parameter in block.module.parameters())
    if weights * sum(len(sample.input_ids) for sample in samples) <= MAX_SAMPLE_PRODUCTS:
        return config
    return config.large or config


def flatten_prompts(prompts: Prompts) -> tuple[list[Sample], list[int]]:
    """All prompts in order, and for each the index of the sample whose images it is about."""
    return [p for about in prompts for p in about], [index for index, about in enumerate(prompts) for _ in about]


def label_block_inputs(block: Block, blocks: ModelBlocks, prompts: Prompts) -> list[torch.Tensor]:
    """The TokenLabel of every token of every input of `block`, int64, in the order of the inputs.

    Decoder blocks run on all prompts, and each of their labels has shape [S]. Vision tower and projector run on the samples
    that have images, and see image tokens only; the single label, of shape [1], holds for all tokens of the input.
    """
    if block in blocks.text_layers:
        return [label_tokens(prompt, blocks.image_token_id) for prompt in flatten_prompts(prompts)[0]]
    return [torch.tensor([int(TokenLabel.IMAGE)]) for sample, *_ in prompts if len(sample.pixel_values)]


def group_by_image_tokens(samples: Sequence[Sample], image_token_id: int) -> list[list[int]]:
    """Indices of the samples with images, one list for each combination of number of images and number of image tokens.

    Samples in one list can exchange their images without changing the length of any prompt.
    """
    members: dict[tuple[int, int], list[int]] = {}
    for index, sample in enumerate(samples):
        if len(sample.pixel_values):
            tokens = int((sample.input_ids == image_token_id).sum())
            members.setdefault((len(sample.pixel_values), tokens), []).append(index)
    return list(members.values())
