"""Observers against numpy on the whole data, for any values and any split into batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.observers import InputObserver
from qvlm_export.calibrate.quantization.tokens import ALL_LABELS, TokenLabel, label_tokens

FRACTIONS = (1.0, 0.995, 0.99, 0.985, 0.98, 0.5, 0.01)


@st.composite
def batches(draw):
    """Rows float32 [tokens, channels] of very different magnitudes, their labels, and where to split them into batches."""
    tokens, channels = draw(st.integers(1, 30)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = 2.0 ** draw(st.lists(st.integers(-30, 30), min_size=tokens, max_size=tokens).map(np.array))
    rows = (rng.standard_normal((tokens, channels)) * sizes[:, None]).astype(np.float32)
    rows[rng.random(rows.shape) < 0.2] = 0.0
    cuts = sorted(draw(st.lists(st.integers(0, tokens), max_size=4)))
    return rows, rng.integers(0, 3, tokens), cuts


def observe(rows, labels, cuts):
    observer = InputObserver("layer", rows.shape[1])
    for part, kinds in zip(np.split(rows, cuts), np.split(labels, cuts), strict=True):
        observer.update(torch.from_numpy(part), torch.from_numpy(kinds))
    return observer


def rows_with_labels(rows, labels, selected):
    return rows[np.isin(labels, [int(label) for label in selected])]


@settings(deadline=None, max_examples=80)
@given(batches(), st.sampled_from([ALL_LABELS, (TokenLabel.PROMPT,), (TokenLabel.IMAGE, TokenLabel.ANSWER)]))
def test_counts_and_ranges_equal_those_of_the_whole_data(data, selected):
    rows, labels, cuts = data
    observer, own_rows = observe(rows, labels, cuts), rows_with_labels(rows, labels, selected)
    assert observer.tokens(selected) == len(own_rows)
    amax = np.abs(own_rows).max(0) if len(own_rows) else np.zeros(rows.shape[1])
    np.testing.assert_array_equal(observer.amax(selected).numpy(), amax)


@settings(deadline=None, max_examples=80)
@given(batches(), st.sampled_from([ALL_LABELS, (TokenLabel.IMAGE, TokenLabel.PROMPT)]), st.sampled_from(FRACTIONS))
def test_percentiles_are_at_most_one_bin_above_the_exact_ones(data, selected, fraction):
    rows, labels, cuts = data
    histogram, own_rows = observe(rows, labels, cuts).histogram(selected), rows_with_labels(rows, labels, selected)
    assert int(histogram.counts.sum()) == own_rows.size
    if not own_rows.size:
        assert histogram.percentile(fraction) == 0.0
        return
    exact = np.quantile(np.abs(own_rows), fraction, method="inverted_cdf")
    assert exact <= histogram.percentile(fraction) <= exact + histogram.width
    assert histogram.width <= 2 * np.abs(rows).max() / 2**14 or np.abs(rows).max() < 2.0**-100
    if fraction == 1.0:
        assert histogram.percentile(fraction) == exact


@settings(deadline=None, max_examples=60)
@given(batches())
def test_the_split_into_batches_does_not_matter(data):
    rows, labels, cuts = data
    for selected in (ALL_LABELS, (TokenLabel.ANSWER,)):
        one, two = observe(rows, labels, []).histogram(selected), observe(rows, labels, cuts).histogram(selected)
        assert (one.width, one.amax) == (two.width, two.amax)
        assert torch.equal(one.counts, two.counts)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-42, -1e-42, 3.4e38, -3.4e38, 1.0, -1.0])
def test_extreme_values_are_counted(value):
    rows = torch.tensor([[value]])
    labels = torch.tensor([1])
    observer = InputObserver("layer", 1)
    observer.update(rows, labels)
    observer.update(torch.tensor([[2.0]]), labels)
    histogram = observer.histogram()
    assert int(histogram.counts.sum()) == 2
    assert histogram.amax == max(abs(float(rows[0, 0])), 2.0)


def test_tokens_of_a_sample_are_labelled_image_prompt_and_answer():
    sample = Sample(np.array([1, 9, 9, 5, 6, 7, 2]), np.zeros((1, 3, 2, 2), np.float32), answer_start=5)
    assert label_tokens(sample, 9).tolist() == [1, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_raise_an_error_and_are_not_added(value):
    observer = InputObserver("layers.3.mlp.fc1", 2)
    observer.update(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UserError, match=r"^layers\.3\.mlp\.fc1: activations of batch 1 are not finite"):
        observer.update(torch.tensor([[1.0, value]]), torch.zeros(1, dtype=torch.int64))
    assert observer.tokens() == 3
    assert observer.histogram().amax == 1.0


def test_zeros_in_the_first_batch_do_not_widen_the_bins():
    observer = InputObserver("x", 1)
    for value in (0.0, 0.3):
        observer.update(torch.full((2, 1), value), torch.zeros(2, dtype=torch.int64))
    assert observer.histogram().width <= 2 * 0.3 / 2**14
