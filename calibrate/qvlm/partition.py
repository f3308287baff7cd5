"""Which consecutive layers are searched jointly.

A layer is a group of linears that share an input (q/k/v; o; gate/up; down), in the order they are computed. D(k, k+1) is
the dependency of layer k+1 on layer k, an entropy. A block is a range of layers; it never reaches across a boundary, the
first layer of a module that is in memory alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from qvlm_export.calibrate.qvlm.joint_search import (
    Clip,
)

MAX_DEPTH = 3  # of the paper's blocks

Blocks = tuple[range, ...]  # of layer numbers; together every layer once, in order


def entropy_dependencies(entropies: Sequence[float]) -> list[float]:
    """The paper's D(k, k+1) for all k, from the entropy of every layer's input: that of layer k+1.

    Printed as a conditional entropy of x_{k+1} given x_k; the marginal entropy of x_{k+1} is its upper bound.
    """
    return list(entropies[1:])


def median_thresholds(entropies: Sequence[float], num_bits: Sequence[int]) -> list[float]:
    """h0 for each D(k, k+1): the median entropy of all layers that have as many bits as layer k+1.

    The paper does not give h0. Entropies of different bit widths cannot be compared: 8 bits can have twice those of 4.
    """
    by_bits = {bits: [e for e, b in zip(entropies, num_bits, strict=True) if b == bits] for bits in set(num_bits)}
    return [statistics.median(by_bits[bits]) for bits in num_bits[1:]]


def partition_by_rule(
    dependencies: Sequence[float], thresholds: Sequence[float], boundaries: Collection[int], max_depth: int = MAX_DEPTH
) -> Blocks:
    """The paper's blocks: layers r..s belong together iff D(r, r+1) + .. + D(s-1, s) > (s - r) * h0.

    From the first layer on, the deepest block that fulfils it is taken; a layer that starts none is alone. dependencies and
    thresholds: one for each pair of consecutive layers (h0 may differ between pairs; then their sum takes its place).
    """
    layers = len(dependencies) + 1
    excess = [d - h for d, h in zip(dependencies, thresholds, strict=True)]
    blocks: list[range] = []
    start = 0
    while start < layers:
        longest = _longest(start, layers, boundaries, max_depth)
        deep = [stop for stop in range(start + 2, longest + 1) if sum(excess[start : stop - 1]) > 0]
        blocks.append(range(start, max(deep, default=start + 1)))
        start = blocks[-1].stop
    return tuple(blocks)


def partition_layerwise(layers: int) -> Blocks:
    """Every layer a block of its own."""
    return tuple(range(k, k + 1) for k in range(layers))


def _longest(start: int, layers: int, boundaries: Collection[int], max_depth: int) -> int:
    """The last `stop` that a block from `start` may have."""
    last = min(start + max_depth, layers)
    return min((b for b in boundaries if start < b < last), default=last)


@dataclass(frozen=True)
class LayerInput:
    """A layer's input in the float model. block: its prefix; linears: names inside it; ranges: amax for each paper clip.

    num_bits: of its quantizer, or of its weights' where it stays float. entropy: of its codes with the whole range, in nats.
    """

    block: str
    linears: tuple[str, ...]
    num_bits: int
    entropy: float
    ranges: Mapping[Clip, float]


def partition_by_entropy(inputs: Sequence[LayerInput]) -> tuple[Blocks, dict[str, float]]:
    """The paper's blocks, and h0 by bits. Its median is over the whole model, hence a pass before the search."""
    if not inputs:
        return (), {}
    entropies, bits = [x.entropy for x in inputs], [x.num_bits for x in inputs]
    thresholds = median_thresholds(entropies, bits)
    blocks = partition_by_rule(entropy_dependencies(entropies), thresholds, find_boundaries(inputs))
    return blocks, {str(b): h for b, h in zip(bits[1:], thresholds, strict=True)}


def find_boundaries(inputs: Sequence[LayerInput]) -> set[int]:
    """The numbers of the layers that are the first of their module."""
    return {k for k in range(1, len(inputs)) if inputs[k].block != inputs[k - 1].block}
