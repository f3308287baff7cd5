"""The cost of calibrating one block: operations and memory, counted from the shapes of meta modules without any tensor.

The counts follow rtn.py, block_search.py, quantize_linears.py and measure.py: whoever changes what they compute changes the
counts here. Tests compare the forwards with those counted at run time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from qvlm_export.calibrate.blockwise.batching import BATCH_TOKENS
from qvlm_export.calibrate.blockwise.blocks import Block, get_linear
from qvlm_export.calibrate.blockwise.shared_inputs import (
    SharedInput,
    find_shared_inputs,
    list_linears,
    list_linears_before,
    share_of_weights,
)
from qvlm_export.calibrate.calibrators.partial_forward import is_cached
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.cholesky import MIN_BLOCKED_ROWS
from qvlm_export.calibrate.quantization.config import SearchConfig
from qvlm_export.calibrate.quantization.equalize import EXPONENTS
from qvlm_export.calibrate.quantization.expected_error import MAX_ROWS, STEPS
from qvlm_export.calibrate.rounding.kronecker_rounding import SLABS
from qvlm_export.calibrate.rounding.output_hessian import SKETCH_ROWS
from qvlm_export.calibrate.rounding.quantize_linears import MAX_SEARCH_ROWS, WIDE_INPUT
from qvlm_export.calibrate.rounding.range_search import RESIDUAL_FRACTIONS
from qvlm_export.calibrate.sensitivity.tape import MAX_GRAPH_BYTES

FLOAT32_BYTES, FLOAT64_BYTES = 4, 8
# [in, in] matrices in memory together when the widest input is quantized (`factor_hessian`); output matching takes fewer.
SQUARES_FLOAT32, SQUARES_FLOAT64 = 1, 1
SLAB_COLUMN = 12_000  # weights that are rounded to nearest in the time of one column of a slab (`kronecker_rounding.py`)
# Factorizations, by rows^3: Cholesky for output matching; Cholesky in float64, at half the speed, for rounding and for the
# residual energies of the expected error.
SOLVE_FLOPS, ROUNDER_FLOPS, ENERGY_FLOPS = 1 / 3, 2 / 3, 2 / 3
INVERSE_FLOPS = 2.0  # by rows^3, of a factor's inverse in float64


@dataclass(frozen=True)
class Cost:
    """Cost of a part of the calibration.

    flops: of matrix products, on all threads.
    single_flops: of small factorizations, which use one thread.
    shared_flops: of large factorizations and of solving by them, in pieces that the threads share, each computed by one.
    rounded: how many weights are rounded, counted each time.
    forwards: how many prompts and images run through a block, summed over the blocks.
    memory_bytes: of the work on the largest block, without the activations between blocks.
    elements: activations into and out of linears, which norms, activation functions and hooks pass over; a quarter of them
    for round-to-nearest, which fits what was measured.
    """

    flops: float = 0.0
    single_flops: float = 0.0
    shared_flops: float = 0.0
    rounded: float = 0.0
    forwards: float = 0
    memory_bytes: int = 0
    elements: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Returns the cost of both, one after the other: all is summed, but for the memory, which is the larger one's."""
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
        """Returns the cost of doing the same `count` times."""
        return sum([self] * count, Cost())


def count_forward(blocks: Iterable[Block], lengths: Sequence[int]) -> Cost:
    """Returns the cost of one float forward pass through the blocks."""
    return sum((Cost(forward_flops(block, lengths), forwards=len(lengths)) for block in blocks), Cost())


def count_rtn(block: Block, schemes: Mapping[str, LinearScheme], lengths: Sequence[int]) -> Cost:
    """Returns the cost of round-to-nearest in one block. lengths: of its inputs; none where the block is not run."""
    weights = num_weights(block, block.linear_names())
    quantized = num_weights(block, [f"{block.prefix}.{name}" for name in schemes])
    memory = (FLOAT32_BYTES if lengths else 2 * 2) * weights + 2 * quantized
    elements = count_elements(block, lengths) / 4
    return Cost(
        forward_flops(block, lengths), rounded=quantized, forwards=len(lengths), memory_bytes=memory, elements=elements
    )


def count_backward(block: Block, lengths: Sequence[int], config: SearchConfig, *, in_memory: bool) -> Cost:
    """Returns the cost of measuring token sensitivities and output Hessians in one block.

    It is one forward pass and, for every backward pass, the gradients by the inputs, which cost as much as a forward for
    linears and twice as much for attention, and another forward unless the graph of the first one is still in memory. Output
    Hessians with leverage take two backward passes and, for the leverages, two Gram matrices of each shared input's rows,
    the inverse of a factor, and a product with it.
    """
    batch_tokens = max((min(lengths.count(n) * n, max(n, BATCH_TOKENS)) for n in set(lengths)), default=0)
    memory = (
        MAX_GRAPH_BYTES if in_memory else FLOAT32_BYTES * int(num_weights(block) + count_elements(block, [batch_tokens]))
    )
    backwards = config.num_backward_passes()
    forwards = 1 if in_memory else 1 + backwards
    flops = (forwards + backwards) * linear_flops(block, lengths)
    flops += (forwards + 2 * backwards) * attention_flops(block, lengths)
    factors = Cost()
    if config.needs_output_hessians():
        flops += sum(2.0 * sum(lengths) * min(out, SKETCH_ROWS) * out for out, _ in _shapes(block))
    if config.needs_output_hessians() and config.leverage:
        widths = [get_linear(block.module, shared.linears[0]).in_features for shared in find_shared_inputs(block.module)]
        flops += sum(6.0 * sum(lengths) * width**2 for width in widths)
        factors = Cost(single_flops=sum((ROUNDER_FLOPS + INVERSE_FLOPS) * width**3 for width in widths))
        memory += sum(2 * FLOAT32_BYTES * width**2 for width in widths) + 3 * FLOAT64_BYTES * max(widths) ** 2
    elements = (forwards + backwards) * count_elements(block, lengths)
    return Cost(flops, forwards=forwards * len(lengths), memory_bytes=memory, elements=elements) + factors


def output_hessian_bytes(block: Block) -> int:
    """Returns the bytes of the output Hessians of a block: float32, or of wide outputs a sketch in bfloat16."""
    return sum(out * (FLOAT32_BYTES * out if out <= SKETCH_ROWS else 2 * SKETCH_ROWS) for out, _ in _shapes(block))


def _shapes(block: Block) -> list[tuple[int, int]]:
    """Returns [out, in] of each linear."""
    linears = [get_linear(block.module, name.removeprefix(f"{block.prefix}.")) for name in block.linear_names()]
    return [(linear.out_features, linear.in_features) for linear in linears]


def count_search(block: Block, schemes: Mapping[str, LinearScheme], lengths: Sequence[int], config: SearchConfig) -> Cost:
    """Returns the cost of `BlockSearch`: a float run, and a quantized one from shared input to shared input."""
    shared_inputs = [s for s in find_shared_inputs(block.module) if any(name in schemes for name in s.linears)]
    if not shared_inputs:
        memory, elements = FLOAT32_BYTES * num_weights(block), 2 * count_elements(block, lengths)
        return Cost(2 * forward_flops(block, lengths), forwards=2 * len(lengths), memory_bytes=memory, elements=elements)
    runs = 1 + _num_quantized_runs(block, shared_inputs)
    flops = runs * linear_flops(block, lengths) + 2 * attention_flops(block, lengths)  # as if o_proj were quantized
    factors, rounded, memory = Cost(), 0.0, 0
    tokens = sum(lengths)
    for shared in shared_inputs:
        shapes = [
            (get_linear(block.module, name).out_features, get_linear(block.module, name).in_features)
            for name in shared.linears
        ]
        out, width = sum(shape[0] for shape in shapes), shapes[0][1]
        candidates = _num_equalization_candidates(config.equalization) if shared.preceding is not None else 0
        flops += candidates * 2.0 * min(tokens, MAX_SEARCH_ROWS) * out * width
        flops += 2.0 * tokens * width**2 + 2.0 * out * width**2  # the input Hessian, GPTQ
        if config.linear.refit_scales:
            flops += 4.0 * out * width**2
        gap = shared.residual is not None and config.linear.match_residual
        factors += _factorization_cost(ROUNDER_FLOPS * width**3, width) + _output_matching_cost(tokens, width, out, gap=gap)
        if config.linear.weight_ranges == "residual" and any(s.group_size for s in schemes.values()):
            candidates += len(RESIDUAL_FRACTIONS)
        rounded += (candidates + 1) * out * width
        if config.needs_output_hessians():
            flops += sum(2.0 * shape[0] ** 2 * width for shape in shapes)
            factors += sum((_factorization_cost(ROUNDER_FLOPS * shape[0] ** 3, shape[0]) for shape in shapes), Cost())
            rounded += SLAB_COLUMN * SLABS * width
        if config.equalization == "expected" and shared.preceding is not None:
            rounded += STEPS * min(out, MAX_ROWS) * width
            flops += 2.0 * tokens * width**2
            factors += _factorization_cost(ENERGY_FLOPS * width**3, width)
        square_bytes = SQUARES_FLOAT32 * FLOAT32_BYTES + SQUARES_FLOAT64 * FLOAT64_BYTES
        squares = square_bytes * width**2
        if config.needs_output_hessians():
            # The output Hessian and its factor; weight, steps and errors in the order of rounding.
            largest = max(shape[0] for shape in shapes)
            squares += (square_bytes + FLOAT32_BYTES) * largest**2 + 5 * FLOAT32_BYTES * largest * width
        copies = 4 if len(shared.linears) > 1 else 3  # weights of linears that share an input are rounded as one
        streams = 2 * tokens * out if gap else 0  # the float residual stream, and the gap
        memory = max(memory, squares + FLOAT32_BYTES * ((copies * out + 3 * tokens) * width + streams))
    input_widths = sum(get_linear(block.module, shared.linears[0]).in_features for shared in shared_inputs)
    # The block, and every shared input in the float model.
    memory += FLOAT32_BYTES * (num_weights(block) + tokens * input_widths)
    search = Cost(flops, rounded=rounded, forwards=runs * len(lengths), elements=runs * count_elements(block, lengths))
    return replace(search + factors, memory_bytes=memory)


def _output_matching_cost(tokens: int, width: int, out: int, *, gap: bool) -> Cost:
    """Returns the cost of `LayerInputs.match_outputs`: products, a factorization, and solving by it.

    width: input features; out: output features of all linears that share the input. gap: whether the gap of the residual
    stream is matched, too, which takes the float outputs.
    """
    if tokens < width:
        solved = out if gap else min(out, width)  # for many outputs the identity is solved for, and multiplied by the weight
        products = 2.0 * tokens * width * (tokens + solved) + 2.0 * out * width * (width if solved < out else tokens)
        rows = tokens
    elif WIDE_INPUT <= width < out and not gap:
        products, rows, solved = 2.0 * (tokens + out) * width**2, width, width
    else:
        products = 4.0 * tokens * width * out if gap or out < width else 2.0 * (tokens + out) * width**2
        rows, solved = width, out
    return Cost(products, shared_flops=2.0 * solved * rows**2) + _factorization_cost(SOLVE_FLOPS * rows**3, rows)


def _factorization_cost(flops: float, rows: int) -> Cost:
    """Returns the cost of a factorization by `cholesky_`, which shares large matrices among threads."""
    return Cost(shared_flops=flops) if rows >= MIN_BLOCKED_ROWS else Cost(single_flops=flops)


def _num_quantized_runs(block: Block, shared_inputs: Sequence[SharedInput]) -> float:
    """Returns how many forward passes the quantized run takes, by the share of the weights that compute.

    It runs up to each shared input, computes its linears and then the rest; what is cached is not computed again.
    """
    module, runs, cached = block.module, 0.0, list[str]()
    for shared in shared_inputs:
        computed = [name for name in list_linears_before(module, shared) if not is_cached(name, cached)]
        runs += share_of_weights(module, computed)
        runs += share_of_weights(module, shared.linears)
        cached += [shared.enclosing_module] if shared.enclosing_module else shared.linears
    return runs + 1 - _cached_share(module, cached)


def _cached_share(module: nn.Module, cached: Collection[str]) -> float:
    return share_of_weights(module, [name for name in list_linears(module) if is_cached(name, cached)])


def _num_equalization_candidates(equalization: str) -> int:
    """Returns how many equalization factors are tried by quantizing with them."""
    if equalization in {"none", "smoothquant", "expected"}:
        return 0
    return 20 if equalization == "awq" else 1 + 2 * len(EXPONENTS)


def forward_flops(block: Block, lengths: Sequence[int]) -> float:
    return linear_flops(block, lengths) + attention_flops(block, lengths)


def linear_flops(block: Block, lengths: Sequence[int]) -> float:
    return 2.0 * sum(lengths) * num_weights(block)


def attention_flops(block: Block, lengths: Sequence[int]) -> float:
    return 4.0 * sum(length**2 for length in lengths) * input_width(block) if "layers" in block.prefix else 0.0


def count_elements(block: Block, lengths: Sequence[int]) -> float:
    """Returns how many activations go into and come out of the block's linears."""
    return float(sum(lengths)) * sum(out + width for out, width in _shapes(block))


def num_weights(block: Block, names: Iterable[str] | None = None) -> int:
    """Returns the number of weights in these linears, by canonical name; None for all of the block."""
    inside = (name.removeprefix(f"{block.prefix}.") for name in (block.linear_names() if names is None else names))
    return sum(get_linear(block.module, name).weight.numel() for name in inside)


def input_width(block: Block) -> int:
    """Returns the number of input features of the block's first linear."""
    return get_linear(block.module, block.linear_names()[0].removeprefix(f"{block.prefix}.")).in_features


def select_inside(schemes: Mapping[str, LinearScheme], block: Block) -> dict[str, LinearScheme]:
    """Returns the schemes of one block's linears, by their names inside it."""
    start = f"{block.prefix}."
    return {name.removeprefix(start): scheme for name, scheme in schemes.items() if name.startswith(start)}
