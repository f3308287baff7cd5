"""Merging inputs of equal length, and taking the outputs apart again."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qvlm_export.calibrate.blockwise.batching import BATCH_TOKENS, batch_by_length, split_by_size

SHAPES = st.lists(st.tuples(st.integers(1, 3), st.sampled_from((1, 5, 700, 3000))), min_size=1, max_size=9)


@given(SHAPES)
def test_every_input_comes_back_in_its_place(shapes):
    inputs = [torch.full((rows, tokens, 1), float(number)) for number, (rows, tokens) in enumerate(shapes)]
    batches = batch_by_length(inputs)
    merged = batches.merge(inputs)
    for batch, tensor in zip(batches.members, merged, strict=True):
        assert len(batch) == 1 or tensor.shape[0] * tensor.shape[1] <= BATCH_TOKENS
    for before, after in zip(inputs, batches.split(merged), strict=True):
        assert torch.equal(before, after)


def test_equal_lengths_share_a_batch_and_others_do_not():
    inputs = [torch.zeros(1, tokens, 4) for tokens in (10, 20, 10, 20, 30)]
    assert batch_by_length(inputs).members == ((0, 2), (1, 3), (4,))


@given(st.lists(st.integers(1, 20)), st.integers(1, 30))
def test_parts_hold_everything_in_order_and_no_more_than_asked(sizes, most):
    parts = list(split_by_size(range(len(sizes)), sizes, most))
    assert [number for part in parts for number in part] == list(range(len(sizes)))
    totals = [sum(sizes[number] for number in part) for part in parts]
    assert all(total <= most or len(part) == 1 for total, part in zip(totals, parts, strict=True))
    # None could have been filled with the next one.
    assert all(total + sizes[after[0]] > most for total, after in zip(totals, parts[1:], strict=False))
