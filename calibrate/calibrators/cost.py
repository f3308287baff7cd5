"""What calibrating costs, counted from shapes before anything runs. torch modules on meta, no tensor.

The counts follow rtn.py, block_search.py and quantize_linears.py: whoever changes what they compute changes them here,
and tests compare the forwards with those counted at run time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from qvlm_export.calibrate.augmentation.cross_questions import cross_pair_prompts
from qvlm_export.calibrate.augmentation.mixup import MIXING_SHARES, MixupPair, make_mixup_pairs
from qvlm_export.calibrate.augmentation.prompts import flatten_prompts
from qvlm_export.calibrate.augmentation.random_words import replace_words
from qvlm_export.calibrate.blockwise.batching import BATCH_TOKENS
from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks, get_linear
from qvlm_export.calibrate.blockwise.shared_inputs import (
    SharedInput,
    find_shared_inputs,
    list_linears,
    list_linears_before,
    share_of_weights,
)
from qvlm_export.calibrate.calibrators.partial_forward import is_cached
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.cholesky import LARGE
from qvlm_export.calibrate.quantization.config import SearchConfig
from qvlm_export.calibrate.quantization.equalize import EXPONENTS
from qvlm_export.calibrate.quantization.expected_error import MAX_ROWS, STEPS
from qvlm_export.calibrate.rounding.gptq import FRACTIONS
from qvlm_export.calibrate.rounding.learned_rounding import HELD_OUT_EVERY, NUM_CHECKS, STEP_TOKENS
from qvlm_export.calibrate.rounding.output_hessian import SKETCH_ROWS
from qvlm_export.calibrate.rounding.quantize_linears import MAX_SEARCH_ROWS, WIDE_INPUT
from qvlm_export.calibrate.sensitivity.measure import MAX_TAPE_VALUES
from qvlm_export.calibrate.sensitivity.tape import MAX_GRAPH_BYTES, fits_in_memory

FLOAT32_BYTES, FLOAT64_BYTES = 4, 8
NARROW_ABOVE_BYTES = 2**29  # of activations between two blocks; smaller ones stay in 32 bits
# Matrices of in x in that are in memory together when the widest group is rounded (make_rounder); aiming takes less.
SQUARES_FLOAT32, SQUARES_FLOAT64 = 1, 1
# Of a block's weights while it learns: codes, offsets, gradients, Adam's two moments, what rounding keeps for the
# gradients, the copy that is looked at.
LEARNING_COPIES = 12
WALKED = 175  # times as long as to nearest takes a weight to be rounded by its anti-diagonal
# Factorizations by rows^3: Cholesky to aim; Cholesky in float64, at half the speed, to round and for the energies.
SOLVE_FLOPS, ROUNDER_FLOPS, ENERGY_FLOPS = 1 / 3, 2 / 3, 2 / 3
INVERSE_FLOPS = 2.0  # by rows^3, of a factor's inverse in float64


@dataclass(frozen=True)
class Cost:
    """flops: of matrix products on all threads. rounded: weights, each time.

    single_flops: of factorizations, which use one thread; shared_flops: of large ones and of solving by them, in pieces
    that all threads share out, each computed by one.
    elements: activations into and out of linears, which norms, activation functions and hooks pass over; a quarter of
    them where nothing is searched, which fits what was measured.
    forwards: prompts and pictures through a block. memory_bytes: of the largest block's work, beside the activations.
    """

    flops: float = 0.0
    single_flops: float = 0.0
    shared_flops: float = 0.0
    rounded: float = 0.0
    forwards: float = 0
    memory_bytes: int = 0
    elements: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Of one after the other."""
        return Cost(
            self.flops + other.flops,
            self.single_flops + other.single_flops,
            self.shared_flops + other.shared_flops,
            self.rounded + other.rounded,
            self.forwards + other.forwards,
            max(self.memory_bytes, other.memory_bytes),
            self.elements + other.elements,
        )

    def times(self, count: int) -> Cost:
        """The same `count` times over."""
        return sum([self] * count, Cost())


def is_narrow(blocks: ModelBlocks, samples: Sequence[Sample], method: SearchConfig | None) -> bool:
    """Whether activations are kept in 16 bits. By the samples alone: `--memory` must not change a bit of the result."""
    tokens = sum(_text_lengths(blocks, samples, method))
    return FLOAT32_BYTES * _streams(method) * tokens * _width(blocks.text_layers[0]) > NARROW_ABOVE_BYTES


def activation_cache_bytes(blocks: ModelBlocks, samples: Sequence[Sample], method: SearchConfig | None) -> int:
    """Most that lies on disk between blocks: inputs and outputs of one, and the tower's layers that the projector reads."""
    item = FLOAT32_BYTES // 2 if is_narrow(blocks, samples, method) else FLOAT32_BYTES
    patches = blocks.num_patches() * sum(len(sample.pixel_values) for sample in samples)
    vision = (1 + len(blocks.features)) * patches * _width(blocks.vision_layers[0])
    text = 2 * sum(_text_lengths(blocks, samples, method)) * _width(blocks.text_layers[0])
    return item * _streams(method) * max(vision + patches * _width(blocks.text_layers[0]), text)


def sensitivity_bytes(blocks: ModelBlocks, samples: Sequence[Sample], method: SearchConfig | None) -> int:
    """Most that lies on disk before a block is searched: what flows between all of them, for some samples at a time.

    And of two-sided rounding the outputs' metrics, twice for a moment.
    """
    if method is None or method.token_weighting == "plain":
        return 0
    values = blocks.text_width() * blocks.num_blocks() * sum(_asked_lengths(blocks, samples, method))
    searched = blocks.all()
    metrics = sum(_metrics_bytes(block, method) for block in searched) if method.needs_output_hessians() else 0
    return FLOAT32_BYTES * min(MAX_TAPE_VALUES, values) + 2 * metrics


def _streams(method: SearchConfig | None) -> int:
    """How many copies of the samples walk through the blocks: the float model's, and for searching the quantized one's."""
    return 1 if method is None else 2


def _text_lengths(blocks: ModelBlocks, samples: Sequence[Sample], method: SearchConfig | None) -> list[int]:
    """Tokens of each prompt that the decoder reads."""
    found = _asked_lengths(blocks, samples, method)
    if method is None:
        return found
    # Which words are drawn changes no length.
    others = replace_words(
        samples, method.random_word_prompts, np.ones(blocks.vocabulary), blocks.image_token_id, method.seed
    )
    return found + [len(text.input_ids) for text, _ in others]


def _asked_lengths(blocks: ModelBlocks, samples: Sequence[Sample], method: SearchConfig | None) -> list[int]:
    """Of those whose answers count."""
    if method is None:
        return [len(sample.input_ids) for sample in samples]
    prompts = cross_pair_prompts(samples, method.questions, blocks.image_token_id, method.seed)
    return [len(prompt.input_ids) for prompt in flatten_prompts(prompts)[0]] + [
        len(pair.text.input_ids) for pair in _mixed(blocks, samples, method)
    ]


def _mixed(blocks: ModelBlocks, samples: Sequence[Sample], method: SearchConfig) -> list[MixupPair]:
    """Prompts about mixtures, of which those go on that leave the model undecided: here, all."""
    return make_mixup_pairs(samples, method.mixup_prompts, blocks.image_token_id, method.seed)


def estimate_calibration_cost(
    blocks: ModelBlocks, plan: Mapping[str, LinearScheme], samples: Sequence[Sample], method: SearchConfig | None
) -> Cost:
    """method: of the searching calibrator, None for round-to-nearest."""
    texts = _text_lengths(blocks, samples, method)
    patches = blocks.num_patches()
    pictures = [patches] * sum(len(sample.pixel_values) for sample in samples)
    vision = blocks.vision()
    parts = [*((block, pictures) for block in vision), *((block, texts) for block in blocks.text_layers)]
    if method is not None:
        probed = Cost()
        if method.token_weighting != "plain":
            asked = _asked_lengths(blocks, samples, method)
            kept = fits_in_memory(blocks, len(pictures), sum(asked))
            probed = sum((_probed(b, pictures, method, kept=kept) for b in vision), Cost())
            probed += sum((_probed(b, asked, method, kept=kept) for b in blocks.text_layers), Cost())
            # Of what flows between the blocks, a block's inputs and outputs, and the gradients of both.
            flowing = 4 * FLOAT32_BYTES * min(MAX_TAPE_VALUES // blocks.num_blocks(), blocks.text_width() * sum(asked))
            probed = replace(probed, memory_bytes=probed.memory_bytes + flowing)
        if mixed := _mixed(blocks, samples, method):
            tried = [len(pair.text.input_ids) for pair in mixed] * len(MIXING_SHARES)
            probed += _plain(vision, pictures) + _plain(blocks.text_layers, tried)
            if method.token_weighting != "plain":
                others = sum(len(samples[n].pixel_values) for n in {pair.other for pair in mixed})
                probed += _plain(vision, [patches] * others)
        own = [method if block in blocks.text_layers else method.for_vision() for block, _ in parts]
        found = sum((_searched(b, _of(plan, b), lengths, m) for (b, lengths), m in zip(parts, own, strict=True)), probed)
        metrics = sum(_metrics_bytes(b, method) for b, _ in parts) if method.needs_output_hessians() else 0
        return replace(found, memory_bytes=found.memory_bytes + metrics)
    looks = [any(s.activation_bits is not None for s in _of(plan, block).values()) for block, _ in parts]
    walked = max((number + 1 for number, looked in enumerate(looks) if looked), default=0)
    return sum((_nearest(b, _of(plan, b), x if n < walked else []) for n, (b, x) in enumerate(parts)), Cost())


def _plain(blocks: Iterable[Block], lengths: Sequence[int]) -> Cost:
    """Once forwards."""
    return sum((Cost(_forward_flops(block, lengths), forwards=len(lengths)) for block in blocks), Cost())


def _of(plan: Mapping[str, LinearScheme], block: Block) -> dict[str, LinearScheme]:
    start = f"{block.prefix}."
    return {name.removeprefix(start): scheme for name, scheme in plan.items() if name.startswith(start)}


def _nearest(block: Block, plan: Mapping[str, LinearScheme], lengths: Sequence[int]) -> Cost:
    weights, planned = _weights(block, block.linear_names()), _weights(block, [f"{block.prefix}.{name}" for name in plan])
    memory = (FLOAT32_BYTES if lengths else 2 * 2) * weights + 2 * planned
    elements = _elements(block, lengths) / 4
    return Cost(
        _forward_flops(block, lengths), rounded=planned, forwards=len(lengths), memory_bytes=memory, elements=elements
    )


def _probed(block: Block, lengths: Sequence[int], method: SearchConfig, *, kept: bool) -> Cost:
    """Forwards; backwards to the inputs, for linears as much as forwards, for attention twice, and before that again
    forwards, unless that was kept. For the outputs' metrics twice backwards, and leverages: two Gram matrices of each
    group's inputs, a factor's inverse, and a product with it."""
    together = max((min(lengths.count(n) * n, max(n, BATCH_TOKENS)) for n in set(lengths)), default=0)  # one call's tokens
    memory = MAX_GRAPH_BYTES if kept else FLOAT32_BYTES * int(_weights(block) + _elements(block, [together]))
    back = method.num_backward_passes()
    runs = 1 if kept else 1 + back
    flops = (runs + back) * _linear_flops(block, lengths) + (runs + 2 * back) * _attention_flops(block, lengths)
    factors = Cost()
    if method.needs_output_hessians():
        flops += sum(2.0 * sum(lengths) * min(out, SKETCH_ROWS) * out for out, _ in _shapes(block))
    if method.needs_output_hessians() and method.leverage:
        inputs = [get_linear(block.module, group.linears[0]).in_features for group in find_shared_inputs(block.module)]
        flops += sum(6.0 * sum(lengths) * into**2 for into in inputs)
        factors = Cost(single_flops=sum((ROUNDER_FLOPS + INVERSE_FLOPS) * into**3 for into in inputs))
        memory += sum(2 * FLOAT32_BYTES * into**2 for into in inputs) + 3 * FLOAT64_BYTES * max(inputs) ** 2
    elements = (runs + back) * _elements(block, lengths)
    return Cost(flops, forwards=runs * len(lengths), memory_bytes=memory, elements=elements) + factors


def _metrics_bytes(block: Block, method: SearchConfig) -> int:
    outputs = [*(out for out, _ in _shapes(block)), *([_width(block)] if method.learn_steps else [])]
    return sum(out * (FLOAT32_BYTES * out if out <= SKETCH_ROWS else 2 * SKETCH_ROWS) for out in outputs)


def _shapes(block: Block) -> list[tuple[int, int]]:
    """[out, in] of each linear."""
    linears = [get_linear(block.module, name.removeprefix(f"{block.prefix}.")) for name in block.linear_names()]
    return [(linear.out_features, linear.in_features) for linear in linears]


def _searched(block: Block, plan: Mapping[str, LinearScheme], lengths: Sequence[int], method: SearchConfig) -> Cost:
    """Counted from BlockSearch: a float run, and a quantized one from group to group."""
    groups = [g for g in find_shared_inputs(block.module) if any(name in plan for name in g.linears)]
    if not groups:
        memory, elements = FLOAT32_BYTES * _weights(block), 2 * _elements(block, lengths)
        return Cost(2 * _forward_flops(block, lengths), forwards=2 * len(lengths), memory_bytes=memory, elements=elements)
    runs = 1 + _quantized_runs(block, groups, learns=method.learn_steps > 0)
    flops = runs * _linear_flops(block, lengths) + 2 * _attention_flops(block, lengths)  # as if o were planned
    factors, rounded, memory = Cost(), 0.0, 0
    tokens = sum(lengths)
    for group in groups:
        shapes = [
            (get_linear(block.module, name).out_features, get_linear(block.module, name).in_features)
            for name in group.linears
        ]
        out, into = sum(shape[0] for shape in shapes), shapes[0][1]
        tried = _candidates(method.equalization) if group.preceding is not None else 0
        flops += tried * 2.0 * min(tokens, MAX_SEARCH_ROWS) * out * into
        flops += 2.0 * tokens * into**2 + 2.0 * out * into**2  # the Gram matrix, GPTQ
        if method.linear.weight_ranges == "rounded" and any(s.group_size for s in plan.values()):
            flops += (2.0 * len(FRACTIONS) + 2.0 * (1 + len(FRACTIONS))) * out * into**2
        factors += _factor(ROUNDER_FLOPS * into**3, into) + _aiming(tokens, into, out)
        rounded += (tried + 1) * out * into
        if method.needs_output_hessians():
            flops += sum(2.0 * shape[0] ** 2 * into for shape in shapes)
            factors += sum((_factor(ROUNDER_FLOPS * shape[0] ** 3, shape[0]) for shape in shapes), Cost())
            rounded += WALKED * out * into
        if method.equalization == "expected" and group.preceding is not None:
            rounded += STEPS * min(out, MAX_ROWS) * into
            flops += 2.0 * tokens * into**2
            factors += _factor(ENERGY_FLOPS * into**3, into)
        square = SQUARES_FLOAT32 * FLOAT32_BYTES + SQUARES_FLOAT64 * FLOAT64_BYTES
        squares = square * into**2
        if (
            method.needs_output_hessians()
        ):  # the outputs' metric and its factor; weight, steps, errors in the order of rounding
            widest = max(shape[0] for shape in shapes)
            squares += (square + FLOAT32_BYTES) * widest**2 + 5 * FLOAT32_BYTES * widest * into
        copies = 4 if len(group.linears) > 1 else 3  # weights of linears that share an input are rounded as one
        memory = max(memory, squares + FLOAT32_BYTES * (copies * out + 3 * tokens) * into)
    inputs = sum(get_linear(block.module, group.linears[0]).in_features for group in groups)
    # The block, what of it is rounded where the float weights learn on; every group's input in the float model.
    copies = 1 + int(method.learn_steps > 0)
    memory += FLOAT32_BYTES * (copies * _weights(block) + tokens * inputs)
    learned = _learned(block, lengths, method)
    done = Cost(flops, rounded=rounded, forwards=runs * len(lengths), elements=runs * _elements(block, lengths))
    return replace(done + factors + learned, memory_bytes=memory + learned.memory_bytes)


def _learned(block: Block, lengths: Sequence[int], method: SearchConfig) -> Cost:
    """Steps on part of the prompts, each a forward and a backward that costs two; looks at those held back; once all."""
    if not method.learn_steps:
        return Cost()
    looks, tokens = 1 + (1 + NUM_CHECKS) / HELD_OUT_EVERY, sum(lengths)
    taught = method.learn_steps * STEP_TOKENS
    flops = 2.0 * _weights(block) * (3 * taught + looks * tokens)
    forwards = taught * len(lengths) / max(tokens, 1) + looks * len(lengths)
    memory, rounded = LEARNING_COPIES * FLOAT32_BYTES * _weights(block), 3.0 * method.learn_steps * _weights(block)
    return Cost(flops, rounded=rounded, forwards=forwards, memory_bytes=memory)


def _aiming(tokens: int, into: int, out: int) -> Cost:
    """As `Rows.aimed`: products; a factorization, and solving by it."""
    if tokens < into:
        solved = min(out, into)  # for many outputs the identity is aimed, and multiplied
        products, rows = (
            2.0 * tokens * into * (tokens + solved) + 2.0 * out * into * (into if out > into else tokens),
            tokens,
        )
    elif WIDE_INPUT <= into < out:
        products, rows, solved = 2.0 * (tokens + out) * into**2, into, into
    else:
        products = 4.0 * tokens * into * out if out < into else 2.0 * (tokens + out) * into**2
        rows, solved = into, out
    return Cost(products, shared_flops=2.0 * solved * rows**2) + _factor(SOLVE_FLOPS * rows**3, rows)


def _factor(flops: float, rows: int) -> Cost:
    """As `cholesky_`."""
    return Cost(shared_flops=flops) if rows >= LARGE else Cost(single_flops=flops)


def _quantized_runs(block: Block, groups: Sequence[SharedInput], *, learns: bool) -> float:
    """Forwards: up to each group, its linears, the rest unless the block learns first; nothing twice that is known."""
    module, found, known = block.module, 0.0, list[str]()
    for group in groups:
        found += share_of_weights(
            module, [name for name in list_linears_before(module, group) if not is_cached(name, known)]
        )
        found += share_of_weights(module, group.linears)
        known += [group.enclosing_module] if group.enclosing_module else group.linears
    return found if learns else found + 1 - _known_share(module, known)


def _known_share(module: nn.Module, known: Collection[str]) -> float:
    return share_of_weights(module, [name for name in list_linears(module) if is_cached(name, known)])


def _candidates(folding: str) -> int:
    if folding in {"none", "smoothquant", "expected"}:
        return 0
    return 20 if folding == "awq" else 1 + 2 * len(EXPONENTS)


def _forward_flops(block: Block, lengths: Sequence[int]) -> float:
    return _linear_flops(block, lengths) + _attention_flops(block, lengths)


def _linear_flops(block: Block, lengths: Sequence[int]) -> float:
    return 2.0 * sum(lengths) * _weights(block)


def _attention_flops(block: Block, lengths: Sequence[int]) -> float:
    return 4.0 * sum(length**2 for length in lengths) * _width(block) if "layers" in block.prefix else 0.0


def _elements(block: Block, lengths: Sequence[int]) -> float:
    return float(sum(lengths)) * sum(out + into for out, into in _shapes(block))


def _weights(block: Block, names: Iterable[str] | None = None) -> int:
    inside = (name.removeprefix(f"{block.prefix}.") for name in (block.linear_names() if names is None else names))
    return sum(get_linear(block.module, name).weight.numel() for name in inside)


def _width(block: Block) -> int:
    return get_linear(block.module, block.linear_names()[0].removeprefix(f"{block.prefix}.")).in_features
