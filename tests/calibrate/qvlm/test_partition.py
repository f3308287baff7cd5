"""The paper's partition rule, checked against all possible partitions and on examples worked out by hand."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm_export.calibrate.qvlm.partition import (
    LayerInput,
    entropy_dependencies,
    median_thresholds,
    partition_by_entropy,
    partition_by_rule,
)


def all_partitions(layers, boundaries, max_depth):
    """Yields every partition with a cut before each boundary and no block deeper than max_depth."""
    for cuts in itertools.product([False, True], repeat=layers - 1):
        starts = [0, *(k + 1 for k, cut in enumerate(cuts) if cut)]
        blocks = tuple(range(a, b) for a, b in itertools.pairwise([*starts, layers]))
        inside = {k for block in blocks for k in block[1:]}
        if not inside & set(boundaries) and all(len(b) <= max_depth for b in blocks):
            yield blocks


@st.composite
def draw_chains(draw):
    layers = draw(st.integers(1, 9))
    dependencies = draw(st.lists(st.integers(0, 20).map(float), min_size=layers - 1, max_size=layers - 1))
    return layers, dependencies, draw(st.sets(st.integers(0, layers))), draw(st.integers(1, 4))


@settings(deadline=None, max_examples=150)
@given(draw_chains(), st.integers(0, 20))
def test_every_block_fulfils_the_rule_and_no_deeper_block_would(chain, threshold):
    layers, dependencies, boundaries, max_depth = chain
    blocks = partition_by_rule(dependencies, [threshold] * (layers - 1), boundaries, max_depth)
    assert blocks in set(all_partitions(layers, boundaries, max_depth))
    for block in blocks:
        first, last = block[0], block[-1]
        if last > first:
            assert sum(dependencies[first:last]) > (last - first) * threshold
        for stop in range(last + 1, min(first + max_depth, layers)):
            if set(range(first + 1, stop + 1)) & boundaries:
                break
            assert sum(dependencies[first:stop]) <= (stop - first) * threshold


@pytest.mark.parametrize(
    ("dependencies", "boundaries", "cuts"),
    [
        ([3, 3, 3, 3, 3], (), [0, 3]),  # all above h0 = 2: blocks of the greatest depth
        ([1, 1, 1, 1, 1], (), [0, 1, 2, 3, 4, 5]),
        ([2, 2, 2, 2, 2], (), [0, 1, 2, 3, 4, 5]),  # equal is not above
        ([1, 4, 1, 1, 1], (), [0, 3, 4, 5]),  # 1 + 4 > 2 * 2, though D(0, 1) alone is below
        ([3, 1, 3, 1, 3], (), [0, 2, 4]),  # 3 + 1 = 2 * 2 is not above, so no block of three layers
        ([3, 3, 3, 3, 3], (2,), [0, 2, 5]),
        ([3, 3, 3, 3, 3], (0, 1, 2, 3, 4, 5), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_the_rule_gives_the_partitions_worked_out_by_hand(dependencies, boundaries, cuts):
    blocks = partition_by_rule(dependencies, [2.0] * 5, boundaries)
    assert [block.start for block in blocks] == cuts
    assert blocks[-1].stop == 6


def test_thresholds_are_medians_over_the_layers_with_the_same_number_of_bits():
    entropies, bits = [5.0, 1.0, 2.0, 3.0, 7.0], [8, 4, 4, 4, 8]
    assert median_thresholds(entropies, bits) == [2.0, 2.0, 2.0, 6.0]
    assert entropy_dependencies(entropies) == [1.0, 2.0, 3.0, 7.0]


def test_blocks_end_with_their_module_and_thresholds_are_by_bits():
    entropies = [("a", 4, 1.0), ("a", 4, 3.0), ("b", 4, 3.0), ("b", 4, 3.0), ("b", 8, 4.0), ("b", 8, 6.0)]
    inputs = [LayerInput(block, ("x",), bits, entropy, {}) for block, bits, entropy in entropies]
    blocks, thresholds = partition_by_entropy(inputs)
    assert thresholds == {"4": 3.0, "8": 5.0}
    assert [(b.start, b.stop) for b in blocks] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 6)]
    assert partition_by_entropy([]) == ((), {})
