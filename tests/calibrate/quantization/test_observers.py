"""Streaming statistics against numpy on the whole data, for any values and any split into batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm_export.calibrate.blockwise.token_kinds import ALL_LABELS, TokenLabel, label_tokens
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.observers import InputObserver

FRACTIONS = (1.0, 0.995, 0.99, 0.985, 0.98, 0.5, 0.01)


@st.composite
def batches(draw):
    """Rows float32 [tokens, channels] of wildly different sizes, labels, and places to cut them into batches."""
    tokens, channels = draw(st.integers(1, 30)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = 2.0 ** draw(st.lists(st.integers(-30, 30), min_size=tokens, max_size=tokens).map(np.array))
    rows = (rng.standard_normal((tokens, channels)) * sizes[:, None]).astype(np.float32)
    rows[rng.random(rows.shape) < 0.2] = 0.0
    cuts = sorted(draw(st.lists(st.integers(0, tokens), max_size=4)))
    return rows, rng.integers(0, 3, tokens), cuts


def gather(rows, labels, cuts):
    statistics = InputObserver("layer", rows.shape[1])
    for part, kinds in zip(np.split(rows, cuts), np.split(labels, cuts), strict=True):
        statistics.update(torch.from_numpy(part), torch.from_numpy(kinds))
    return statistics


def chosen(rows, labels, wanted):
    return rows[np.isin(labels, [int(label) for label in wanted])]


@settings(deadline=None, max_examples=80)
@given(batches(), st.sampled_from([ALL_LABELS, (TokenLabel.PROMPT,), (TokenLabel.IMAGE, TokenLabel.ANSWER)]))
def test_counts_and_ranges_are_those_of_the_whole(data, wanted):
    rows, labels, cuts = data
    statistics, mine = gather(rows, labels, cuts), chosen(rows, labels, wanted)
    assert statistics.tokens(wanted) == len(mine)
    amax = np.abs(mine).max(0) if len(mine) else np.zeros(rows.shape[1])
    np.testing.assert_array_equal(statistics.amax(wanted).numpy(), amax)


@settings(deadline=None, max_examples=80)
@given(batches(), st.sampled_from([ALL_LABELS, (TokenLabel.IMAGE, TokenLabel.PROMPT)]), st.sampled_from(FRACTIONS))
def test_percentiles_are_at_most_a_bin_above_the_exact_ones(data, wanted, fraction):
    rows, labels, cuts = data
    histogram, mine = gather(rows, labels, cuts).histogram(wanted), chosen(rows, labels, wanted)
    assert int(histogram.counts.sum()) == mine.size
    if not mine.size:
        assert histogram.percentile(fraction) == 0.0
        return
    exact = np.quantile(np.abs(mine), fraction, method="inverted_cdf")
    assert exact <= histogram.percentile(fraction) <= exact + histogram.width
    assert histogram.width <= 2 * np.abs(rows).max() / 2**14 or np.abs(rows).max() < 2.0**-100
    if fraction == 1.0:
        assert histogram.percentile(fraction) == exact


@settings(deadline=None, max_examples=60)
@given(batches())
def test_the_split_into_batches_does_not_matter(data):
    rows, labels, cuts = data
    for wanted in (ALL_LABELS, (TokenLabel.ANSWER,)):
        one, two = gather(rows, labels, []).histogram(wanted), gather(rows, labels, cuts).histogram(wanted)
        assert (one.width, one.amax) == (two.width, two.amax)
        assert torch.equal(one.counts, two.counts)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-42, -1e-42, 3.4e38, -3.4e38, 1.0, -1.0])
def test_extreme_values_are_counted(value):
    rows = torch.tensor([[value]])
    labels = torch.tensor([1])
    statistics = InputObserver("layer", 1)
    statistics.update(rows, labels)
    statistics.update(torch.tensor([[2.0]]), labels)
    histogram = statistics.histogram()
    assert int(histogram.counts.sum()) == 2
    assert histogram.amax == max(abs(float(rows[0, 0])), 2.0)


def test_labels_of_a_sample():
    sample = Sample(np.array([1, 9, 9, 5, 6, 7, 2]), np.zeros((1, 3, 2, 2), np.float32), answer_start=5)
    assert label_tokens(sample, 9).tolist() == [1, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named_and_not_added(value):
    statistics = InputObserver("layers.3.mlp.fc1", 2)
    statistics.update(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UserError, match=r"^layers\.3\.mlp\.fc1: activations of batch 1 are not finite"):
        statistics.update(torch.tensor([[1.0, value]]), torch.zeros(1, dtype=torch.int64))
    assert statistics.tokens() == 3
    assert statistics.histogram().amax == 1.0


def test_zeros_first_do_not_make_the_bins_wide():
    statistics = InputObserver("x", 1)
    for value in (0.0, 0.3):
        statistics.update(torch.full((2, 1), value), torch.zeros(2, dtype=torch.int64))
    assert statistics.histogram().width <= 2 * 0.3 / 2**14
