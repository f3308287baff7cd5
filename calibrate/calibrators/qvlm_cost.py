"""The cost of `--effort qvlm` before it runs: gradients and tuning of the visual encoder, observation, and search.

The counts follow `qvlm/vision_optimization.py`, `qvlm/observe.py` and `qvlm/block_search.py`: whoever changes what they
compute changes the counts here. Tests compare the forwards with those counted at run time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks, get_linear
from qvlm_export.calibrate.blockwise.shared_inputs import find_shared_inputs
from qvlm_export.calibrate.calibrators.block_cost import (
    FLOAT32_BYTES,
    Cost,
    attention_flops,
    count_backward,
    count_elements,
    forward_flops,
    linear_flops,
    num_weights,
    select_inside,
)
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.qvlm.block_search import count_forwards
from qvlm_export.calibrate.qvlm.config import QvlmConfig
from qvlm_export.calibrate.qvlm.joint_search import PERCENTILES
from qvlm_export.calibrate.qvlm.partition import MAX_DEPTH
from qvlm_export.calibrate.qvlm.vision_optimization import GRADIENTS, list_tunable_blocks, select_vision_samples
from qvlm_export.calibrate.sensitivity.measure import MAX_TAPE_VALUES
from qvlm_export.calibrate.sensitivity.tape import fits_in_memory

# Depths of a module's blocks, by prefix of the module.
Depths = Mapping[str, Sequence[int]]


def count_qvlm(
    blocks: ModelBlocks,
    schemes: Mapping[str, LinearScheme],
    samples: Sequence[Sample],
    config: QvlmConfig,
    depths: Depths | None = None,
) -> Cost:
    """Returns the cost of `calibrate_qvlm`.

    schemes: by canonical name, of the linears to quantize. depths: of the partition; None for the one that costs most, as it
    follows from entropies that are measured later.
    """
    texts, images = [len(sample.input_ids) for sample in samples], _image_lengths(blocks, samples)
    parts = [*((block, images) for block in blocks.vision()), *((block, texts) for block in blocks.text_layers)]
    cost = _count_vision(blocks, schemes, samples, config)
    for block, lengths in parts:
        elements, weights = count_elements(block, lengths), FLOAT32_BYTES * num_weights(block)
        cost += Cost(forward_flops(block, lengths), forwards=len(lengths), memory_bytes=weights, elements=elements)
        known = None if depths is None else depths.get(block.prefix, ())
        cost += _count_module(block, select_inside(schemes, block), lengths, config, known)
    return cost


def count_vision_tokens(samples: Sequence[Sample], config: QvlmConfig) -> int:
    """Returns the number of tokens of the prompts whose gradients the visual-encoder optimization measures."""
    return sum(len(samples[n].input_ids) for n in select_vision_samples(samples, config))


def _image_lengths(blocks: ModelBlocks, samples: Sequence[Sample]) -> list[int]:
    return [blocks.num_patches()] * sum(len(sample.pixel_values) for sample in samples)


def _count_vision(
    blocks: ModelBlocks, schemes: Mapping[str, LinearScheme], samples: Sequence[Sample], config: QvlmConfig
) -> Cost:
    """Returns the cost of the visual-encoder optimization: gradients by all blocks, then steps on tower and projector."""
    chosen = [samples[n] for n in select_vision_samples(samples, config)]
    tunable = list_tunable_blocks(blocks.vision(), schemes)
    if not chosen or not tunable:
        return Cost()
    images, texts = _image_lengths(blocks, chosen), [len(sample.input_ids) for sample in chosen]
    in_memory, cost = fits_in_memory(blocks, len(images), sum(texts)), Cost()
    for part, lengths in ((blocks.vision(), images), (blocks.text_layers, texts)):
        cost += sum((count_backward(block, lengths, GRADIENTS, in_memory=in_memory) for block in part), Cost())
    # A block's inputs and outputs, as the tape holds them, and the gradients of both.
    values = min(MAX_TAPE_VALUES // blocks.num_blocks(), blocks.text_width() * sum(texts))
    cost = replace(cost, memory_bytes=cost.memory_bytes + 4 * FLOAT32_BYTES * values)
    for block in blocks.vision():
        tuned = block in tunable
        forwards, backwards = (4 + config.vision_epochs, config.vision_epochs) if tuned else (2, 0)
        flops = forwards * forward_flops(block, images)
        flops += backwards * (linear_flops(block, images) + 2 * attention_flops(block, images))
        elements = (forwards + backwards) * count_elements(block, images)
        # The block and its copy; inputs and outputs of both, and what a step keeps for the gradients.
        batch = count_elements(block, images) * min(1.0, config.vision_batch / len(chosen))
        tokens, width = sum(images), max(blocks.text_width(), get_width(block))
        memory = FLOAT32_BYTES * int(2 * num_weights(block) + 4 * tokens * width + 4 * batch)
        forwards *= len(images)
        cost += Cost(single_flops=flops, forwards=forwards, memory_bytes=memory, elements=elements)
    return cost


def get_width(block: Block) -> int:
    """Returns the largest number of inputs or outputs of the block's linears."""
    linears = [get_linear(block.module, name.removeprefix(f"{block.prefix}.")) for name in block.linear_names()]
    return max(max(linear.in_features, linear.out_features) for linear in linears)


def _count_module(
    block: Block,
    schemes: Mapping[str, LinearScheme],
    lengths: Sequence[int],
    config: QvlmConfig,
    depths: Sequence[int] | None,
) -> Cost:
    """Returns the cost of `search_both`. depths: of the module's blocks; None for those that cost most."""
    module, tokens, elements = block.module, sum(lengths), count_elements(block, lengths)
    shared_inputs = [s for s in find_shared_inputs(module) if any(name in schemes for name in s.linears)]
    weights = num_weights(block)
    if not shared_inputs or not lengths:
        flops, memory = 2 * forward_flops(block, lengths), FLOAT32_BYTES * weights
        return Cost(flops, forwards=2 * len(lengths), memory_bytes=memory, elements=2 * elements)
    layers = [shared.linears for shared in shared_inputs]
    quantizes_input = [any(schemes[n].activation_bits is not None for n in names if n in schemes) for names in layers]
    max_depth = 1 if config.partition == "layers" else MAX_DEPTH
    options = [depths] if depths is not None else list(list_depths(len(layers), max_depth))
    counts = [count_calls(quantizes_input, option) for option in options]
    calls, replays = max(counts, key=lambda count: count_forwards(module, layers, *count))
    forwards = 1 + count_forwards(module, layers, calls, replays)
    flops = forwards * linear_flops(block, lengths) + (1 + sum(replays[1:])) * attention_flops(block, lengths)
    linears = [[get_linear(module, name) for name in names] for names in layers]
    sizes = [sum(linear.weight.numel() for linear in part) for part in linears]
    outputs = sum(linear.out_features for part in linears for linear in part)
    widest = max(part[0].in_features for part in linears)
    # Float outputs, quantized ones and those that are tried; a layer's input, rounded and in between.
    memory = FLOAT32_BYTES * (2 * weights + 3 * max(sizes) + tokens * (3 * outputs + 3 * widest))
    rounded = float(sum(count * size for count, size in zip(calls, sizes, strict=True)))
    return Cost(
        flops,
        rounded=rounded,
        forwards=forwards * len(lengths),
        memory_bytes=memory,
        elements=(forwards + sum(replays)) * elements,
    )


def count_calls(quantizes_input: Sequence[bool], depths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Returns how often a search computes each layer, and how often it replays the module up to each layer and to its end.

    quantizes_input: of each layer, whether its input has ranges to search; its weights have. depths: of the blocks.
    """
    calls, replays = [0] * len(quantizes_input), [0] * len(quantizes_input)
    start = 0
    for depth in depths:
        numbers = range(start, start + depth)
        for searched in ([quantizes_input[n] for n in numbers], [True] * depth):
            combinations = 1
            for number, has_candidates in zip(numbers, searched, strict=True) if any(searched) else ():
                replays[number] += combinations
                combinations *= len(PERCENTILES) if has_candidates else 1
                calls[number] += combinations
        start += depth
    return calls, [*replays, 1]


def list_depths(layers: int, max_depth: int) -> Iterator[tuple[int, ...]]:
    """Yields the depths of the blocks of every partition of this many layers."""
    if not layers:
        yield ()
    for depth in range(1, min(layers, max_depth) + 1):
        yield from ((depth, *rest) for rest in list_depths(layers - depth, max_depth))
