"""The cost of a calibration before it runs: operations, memory and disk of all blocks, for estimates and the preflight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from qvlm_export.calibrate.augmentation.cross_questions import cross_pair_prompts
from qvlm_export.calibrate.augmentation.prompts import flatten_prompts, limit_prompts
from qvlm_export.calibrate.augmentation.random_words import replace_words
from qvlm_export.calibrate.blockwise.blocks import ModelBlocks
from qvlm_export.calibrate.calibrators.block_cost import (
    FLOAT32_BYTES,
    Cost,
    count_backward,
    count_forward,
    count_rtn,
    count_search,
    input_width,
    output_hessian_bytes,
    select_inside,
)
from qvlm_export.calibrate.calibrators.efforts import EffortConfig
from qvlm_export.calibrate.calibrators.qvlm_cost import count_qvlm, count_vision_tokens
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.quantization.config import SearchConfig
from qvlm_export.calibrate.qvlm.config import QvlmConfig
from qvlm_export.calibrate.sensitivity.measure import MAX_TAPE_VALUES
from qvlm_export.calibrate.sensitivity.tape import fits_in_memory

NARROW_ABOVE_BYTES = 2**29  # of activations between two blocks; smaller ones stay in 32 bits


def is_narrow(blocks: ModelBlocks, samples: Sequence[Sample], config: EffortConfig) -> bool:
    """Whether the activations between blocks are kept in 16 bits.

    This depends on the model, the samples and the method alone, as `--memory` must not change a bit of the result.
    """
    tokens = sum(_text_lengths(blocks, samples, _fit(config, blocks, samples)))
    return FLOAT32_BYTES * _num_streams(config) * tokens * input_width(blocks.text_layers[0]) > NARROW_ABOVE_BYTES


def activation_cache_bytes(blocks: ModelBlocks, samples: Sequence[Sample], config: EffortConfig) -> int:
    """Returns the largest size of the activation cache on disk, in bytes.

    It holds the inputs and outputs of one block, and the outputs of the vision layers that the projector reads.
    """
    item = FLOAT32_BYTES // 2 if is_narrow(blocks, samples, config) else FLOAT32_BYTES
    patches = blocks.num_patches() * sum(len(sample.pixel_values) for sample in samples)
    vision = (1 + len(blocks.features)) * patches * input_width(blocks.vision_layers[0])
    text = 2 * sum(_text_lengths(blocks, samples, _fit(config, blocks, samples))) * input_width(blocks.text_layers[0])
    return item * _num_streams(config) * max(vision + patches * input_width(blocks.text_layers[0]), text)


def sensitivity_bytes(blocks: ModelBlocks, samples: Sequence[Sample], config: EffortConfig) -> int:
    """Returns the disk space in bytes that measuring token sensitivities and output Hessians takes before the search.

    It holds the tape, which is what flows between all blocks for some samples at a time, and the output Hessians of
    Kronecker-factored rounding, twice for a moment.
    """
    config = _fit(config, blocks, samples)
    if isinstance(config, QvlmConfig):
        tokens = count_vision_tokens(samples, config)
        return FLOAT32_BYTES * min(MAX_TAPE_VALUES, blocks.text_width() * blocks.num_blocks() * tokens)
    if config is None or not config.needs_gradients():
        return 0
    values = blocks.text_width() * blocks.num_blocks() * sum(_measured_lengths(blocks, samples, config))
    all_blocks = blocks.all()
    hessians = sum(output_hessian_bytes(block) for block in all_blocks) if config.needs_output_hessians() else 0
    return FLOAT32_BYTES * min(MAX_TAPE_VALUES, values) + 2 * hessians


def _fit(config: EffortConfig, blocks: ModelBlocks, samples: Sequence[Sample]) -> EffortConfig:
    """Returns what is done for this model: a search of a large decoder adds no prompts."""
    return limit_prompts(config, blocks, samples) if isinstance(config, SearchConfig) else config


def _num_streams(config: EffortConfig) -> int:
    """Returns how often the calibration set runs through each block: in float and, for a search, quantized as well."""
    return 1 if config is None else 2


def _text_lengths(blocks: ModelBlocks, samples: Sequence[Sample], config: EffortConfig) -> list[int]:
    """Returns the number of tokens of each prompt that the decoder reads."""
    lengths = _measured_lengths(blocks, samples, config)
    if not isinstance(config, SearchConfig):
        return lengths
    # Which words are drawn does not change the lengths, so uniform weights do.
    random_texts = replace_words(
        samples, config.random_word_prompts, np.ones(blocks.vocabulary), blocks.image_token_id, config.seed
    )
    return lengths + [len(text.input_ids) for text, _ in random_texts]


def _measured_lengths(blocks: ModelBlocks, samples: Sequence[Sample], config: EffortConfig) -> list[int]:
    """Returns the number of tokens of each prompt that token sensitivities are measured on: all but random texts."""
    if not isinstance(config, SearchConfig):
        return [len(sample.input_ids) for sample in samples]
    prompts = cross_pair_prompts(samples, config.questions_per_image, blocks.image_token_id, config.seed)
    return [len(prompt.input_ids) for prompt in flatten_prompts(prompts)[0]]


def estimate_calibration_cost(
    blocks: ModelBlocks, schemes: Mapping[str, LinearScheme], samples: Sequence[Sample], config: EffortConfig
) -> Cost:
    """Returns the cost of a calibration.

    schemes: by canonical name, of the linears to quantize. config: of the effort. For Q-VLM this is the most it can cost,
    as the partition is not known yet.
    """
    config = _fit(config, blocks, samples)
    if isinstance(config, QvlmConfig):
        return count_qvlm(blocks, schemes, samples, config)
    texts = _text_lengths(blocks, samples, config)
    patches = blocks.num_patches()
    images = [patches] * sum(len(sample.pixel_values) for sample in samples)
    vision = blocks.vision()
    parts = [*((block, images) for block in vision), *((block, texts) for block in blocks.text_layers)]
    if config is not None:
        measured = Cost()
        if config.needs_gradients():
            lengths = _measured_lengths(blocks, samples, config)
            in_memory = fits_in_memory(blocks, len(images), sum(lengths))
            measured = sum((count_backward(b, images, config, in_memory=in_memory) for b in vision), Cost())
            measured += sum((count_backward(b, lengths, config, in_memory=in_memory) for b in blocks.text_layers), Cost())
            # A block's inputs and outputs, as the tape holds them, and the gradients of both.
            values = min(MAX_TAPE_VALUES // blocks.num_blocks(), blocks.text_width() * sum(lengths))
            measured = replace(measured, memory_bytes=measured.memory_bytes + 4 * FLOAT32_BYTES * values)
        methods = [config if block in blocks.text_layers else config.for_vision() for block, _ in parts]
        searches = (count_search(b, select_inside(schemes, b), x, m) for (b, x), m in zip(parts, methods, strict=True))
        cost = sum(searches, measured)
        hessians = sum(output_hessian_bytes(b) for b, _ in parts) if config.needs_output_hessians() else 0
        return replace(cost, memory_bytes=cost.memory_bytes + hessians)
    observed = [any(s.activation_bits is not None for s in select_inside(schemes, block).values()) for block, _ in parts]
    num_run = max((number + 1 for number, needed in enumerate(observed) if needed), default=0)
    return sum((count_rtn(b, select_inside(schemes, b), x if n < num_run else []) for n, (b, x) in enumerate(parts)), Cost())


def estimate_accuracy_cost(blocks: ModelBlocks, samples: Sequence[Sample]) -> Cost:
    """Returns the cost of `measure_accuracy`: a float and a quantized forward pass."""
    images = [blocks.num_patches()] * sum(len(sample.pixel_values) for sample in samples)
    texts = [len(sample.input_ids) for sample in samples]
    return (count_forward(blocks.vision(), images) + count_forward(blocks.text_layers, texts)).times(2)
