"""Which consecutive layers are searched jointly.

A layer is a group of linears that share an input (q/k/v; o; gate/up; down), in the order they are computed. D(k, k+1) is
the dependency of layer k+1 on layer k: the paper's is an entropy; the look-ahead regret costs 2 K layer forwards a pair and
predicts the gain of a joint search, which entropy did not (docs/entropy.md). `printed.py` goes by entropy and the paper's
rule unless it is asked to go by regret under a budget. A block is a range of layers; it never reaches across a boundary, the
first layer of a module that is in memory alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from calibrate.entropy import lookahead_regret

MAX_DEPTH = 3  # of the paper's blocks

Blocks = tuple[range, ...]  # of layer numbers; together every layer once, in order


def entropy_dependencies(entropies: Sequence[float]) -> list[float]:
    """The paper's D(k, k+1) for all k, from the entropy of every layer's input: that of layer k+1.

    Printed as a conditional entropy of x_{k+1} given x_k; the marginal entropy of x_{k+1} is its upper bound.
    """
    return list(entropies[1:])


def regret_dependencies(own: Sequence[Sequence[float]], ahead: Sequence[Sequence[float]]) -> list[float]:
    """The look-ahead regret as D(k, k+1) for all k: the alternative to the paper's.

    own: for each layer, the error of its own output for each of its candidates. ahead: the error of the next layer's output
    for the same candidates, the next layer with its own best candidate; one entry less. A threshold of 0.01, say, says
    that a pair is worth searching when the layer's own choice costs more than 1 % of the next one's error.
    """
    return [lookahead_regret(mine, next_one) for mine, next_one in zip(own[:-1], ahead, strict=True)]


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


def layerwise(layers: int) -> Blocks:
    """Every layer a block of its own."""
    return tuple(range(k, k + 1) for k in range(layers))


def tree_cost(depth: int, candidates: int) -> int:
    """Layer forwards of the exhaustive search of a block whose prefixes are computed once: K + K^2 + .. + K^depth."""
    return sum(candidates**d for d in range(1, depth + 1))


def descent_cost(depth: int, candidates: int, rounds: int) -> int:
    """The most layer forwards of coordinate descent.

    One pass for the start; then in each round each layer's K - 1 other candidates, and all layers behind it with each of
    them: rounds * depth * K runs of the block, half of it on average because what lies before is kept.
    """
    return depth + rounds * (candidates - 1) * depth * (depth + 1) // 2


@dataclass(frozen=True)
class _Partial:
    """A partition of the first layers, and the last of its blocks; `before` is the rest of it."""

    cost: int
    captured: float
    block: range
    before: _Partial | None


def partition_by_budget(
    dependencies: Sequence[float],
    boundaries: Collection[int],
    cost: Callable[[int], int],
    budget: int,
    max_depth: int = MAX_DEPTH,
) -> Blocks:
    """The blocks that capture most dependency, the sum of D(k, k+1) inside them, among those that cost at most `budget`.

    cost: depth of a block -> layer forwards of its search, see tree_cost and descent_cost. Among partitions that capture as
    much the cheapest is taken. Exact: for each number of layers the dynamic program keeps all partitions that no other one
    beats in both cost and dependency. Raises ValueError when even layer by layer costs more than the budget.
    """
    layers = len(dependencies) + 1
    if layers * cost(1) > budget:
        raise ValueError(f"a budget of {budget} layer forwards for {layers} layers, but one by one cost {layers * cost(1)}")
    fronts: list[list[_Partial | None]] = [[None]]
    for stop in range(1, layers + 1):
        reached = [
            _Partial(spent + cost(stop - start), gained + sum(dependencies[start : stop - 1]), range(start, stop), before)
            for start in range(max(0, stop - max_depth), stop)
            if stop <= _longest(start, layers, boundaries, max_depth)
            for before in fronts[start]
            for spent, gained in [(before.cost, before.captured) if before else (0, 0.0)]
        ]
        rest = (layers - stop) * cost(1)
        fronts.append(list(_unbeaten([p for p in reached if p.cost + rest <= budget])))
    blocks: list[range] = []
    partial = fronts[layers][-1]
    while partial is not None:
        blocks.append(partial.block)
        partial = partial.before
    return tuple(reversed(blocks))


def _longest(start: int, layers: int, boundaries: Collection[int], max_depth: int) -> int:
    """The last `stop` that a block from `start` may have."""
    last = min(start + max_depth, layers)
    return min((b for b in boundaries if start < b < last), default=last)


def _unbeaten(partials: list[_Partial]) -> list[_Partial]:
    """In order of cost, only those that capture more than all cheaper ones."""
    kept: list[_Partial] = []
    for partial in sorted(partials, key=lambda p: (p.cost, -p.captured)):
        if not kept or partial.captured > kept[-1].captured:
            kept.append(partial)
    return kept
