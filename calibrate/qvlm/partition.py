"""Entropy-based partition of the layers into blocks that are searched jointly (Q-VLM, arXiv 2410.08119).

A layer is the linears that share an input (q/k/v; o; gate/up; down), in the order in which they are computed. D(k, k+1) is
the dependency of layer k+1 on layer k, an entropy. A block is a range of layers. It never reaches across a boundary, which
is the first layer of a module, as only one module is in memory at a time.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from qvlm_export.calibrate.qvlm.joint_search import (
    Clip,
)

MAX_DEPTH = 3  # layers in a block of the paper

Blocks = tuple[range, ...]  # ranges of layer numbers, in order; together they hold every layer once


def entropy_dependencies(entropies: Sequence[float]) -> list[float]:
    """Returns the paper's D(k, k+1) for all k, from the entropy of every layer's input: that of layer k+1.

    The paper has the conditional entropy of x_{k+1} given x_k; the marginal entropy of x_{k+1} is its upper bound.
    """
    return list(entropies[1:])


def median_thresholds(entropies: Sequence[float], num_bits: Sequence[int]) -> list[float]:
    """Returns h0 for each D(k, k+1): the median entropy of all layers that have as many bits as layer k+1.

    The paper does not give h0. Entropies of different bit widths cannot be compared: 8 bits can have twice those of 4.
    """
    by_bits = {bits: [e for e, b in zip(entropies, num_bits, strict=True) if b == bits] for bits in set(num_bits)}
    return [statistics.median(by_bits[bits]) for bits in num_bits[1:]]


def partition_by_rule(
    dependencies: Sequence[float], thresholds: Sequence[float], boundaries: Collection[int], max_depth: int = MAX_DEPTH
) -> Blocks:
    """Returns the paper's blocks: layers r..s belong together iff D(r, r+1) + .. + D(s-1, s) > (s - r) * h0.

    From the first layer on, the deepest block that fulfils this is taken; a layer that starts none is a block of its own.
    dependencies and thresholds: one for each pair of consecutive layers. Where h0 differs between pairs, the sum of their
    thresholds takes the place of (s - r) * h0. boundaries: numbers of the layers that a block may only start with.
    """
    layers = len(dependencies) + 1
    excess = [d - h for d, h in zip(dependencies, thresholds, strict=True)]
    blocks: list[range] = []
    start = 0
    while start < layers:
        max_stop = _find_max_stop(start, layers, boundaries, max_depth)
        stops = [stop for stop in range(start + 2, max_stop + 1) if sum(excess[start : stop - 1]) > 0]
        blocks.append(range(start, max(stops, default=start + 1)))
        start = blocks[-1].stop
    return tuple(blocks)


def partition_layerwise(layers: int) -> Blocks:
    """Returns the partition in which every layer is a block of its own. layers: how many there are."""
    return tuple(range(k, k + 1) for k in range(layers))


def _find_max_stop(start: int, layers: int, boundaries: Collection[int], max_depth: int) -> int:
    """Returns the largest `stop` that a block from `start` may have."""
    last = min(start + max_depth, layers)
    return min((b for b in boundaries if start < b < last), default=last)


@dataclass(frozen=True)
class LayerInput:
    """Statistics of a layer's input in the float model.

    block: prefix of its module. linears: names inside the module. num_bits: of the input's quantizer, or of the weights'
    where the input stays float. entropy: of its codes with the absmax range, in nats. ranges: amax for each of the paper's
    clips.
    """

    block: str
    linears: tuple[str, ...]
    num_bits: int
    entropy: float
    ranges: Mapping[Clip, float]


def partition_by_entropy(inputs: Sequence[LayerInput]) -> tuple[Blocks, dict[str, float]]:
    """Returns the paper's blocks, and h0 in nats by number of bits.

    The median is over the layers of the whole model, so all of them are observed before any block is searched.
    """
    if not inputs:
        return (), {}
    entropies, bits = [x.entropy for x in inputs], [x.num_bits for x in inputs]
    thresholds = median_thresholds(entropies, bits)
    blocks = partition_by_rule(entropy_dependencies(entropies), thresholds, find_boundaries(inputs))
    return blocks, {str(b): h for b, h in zip(bits[1:], thresholds, strict=True)}


def find_boundaries(inputs: Sequence[LayerInput]) -> set[int]:
    """Returns the numbers of the layers that are the first of their module, layer 0 excepted."""
    return {k for k in range(1, len(inputs)) if inputs[k].block != inputs[k - 1].block}
