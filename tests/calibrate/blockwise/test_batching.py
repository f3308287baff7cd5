"""Batching by length: inputs are merged by length, and outputs are split in the order of the inputs."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qvlm_export.calibrate.blockwise.batching import BATCH_TOKENS, batch_by_length, split_by_size

SHAPES = st.lists(st.tuples(st.integers(1, 3), st.sampled_from((1, 5, 700, 3000))), min_size=1, max_size=9)


@given(SHAPES)
def test_splitting_merged_batches_returns_every_input_in_its_place(shapes):
    inputs = [torch.full((rows, tokens, 1), float(number)) for number, (rows, tokens) in enumerate(shapes)]
    batches = batch_by_length(inputs)
    merged = batches.merge(inputs)
    for batch, tensor in zip(batches.members, merged, strict=True):
        assert len(batch) == 1 or tensor.shape[0] * tensor.shape[1] <= BATCH_TOKENS
    for before, after in zip(inputs, batches.split(merged), strict=True):
        assert torch.equal(before, after)


def test_only_inputs_of_equal_length_share_a_batch():
    inputs = [torch.zeros(1, tokens, 4) for tokens in (10, 20, 10, 20, 30)]
    assert batch_by_length(inputs).members == ((0, 2), (1, 3), (4,))


@given(st.lists(st.integers(1, 20)), st.integers(1, 30))
def test_parts_hold_all_items_in_order_and_are_full_up_to_the_limit(sizes, max_size):
    parts = list(split_by_size(range(len(sizes)), sizes, max_size))
    assert [number for part in parts for number in part] == list(range(len(sizes)))
    totals = [sum(sizes[number] for number in part) for part in parts]
    assert all(total <= max_size or len(part) == 1 for total, part in zip(totals, parts, strict=True))
    # The first item of the next part does not fit into any part.
    assert all(total + sizes[after[0]] > max_size for total, after in zip(totals, parts[1:], strict=False))
