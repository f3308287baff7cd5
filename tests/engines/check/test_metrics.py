"""The metrics against their definitions written as loops over single numbers, and against known values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qvlm_export.engines.check import metrics
from qvlm_export.engines.check.metrics import Sums, cosine, kl_divergence, measure, token_sqnr_db, top1_agreement


def slow_kl(reference, other):
    """KL of two rows, one exponential at a time."""

    def log_probabilities(row):
        largest = max(row)
        total = math.fsum(math.exp(x - largest) for x in row)
        return [x - largest - math.log(total) for x in row]

    p, q = log_probabilities(list(map(float, reference))), log_probabilities(list(map(float, other)))
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def slow_cosine(reference, other):
    """Cosine of two rows."""
    dot = math.fsum(float(a) * float(b) for a, b in zip(reference, other, strict=True))
    return dot / math.dist(reference, [0.0] * len(reference)) / math.dist(other, [0.0] * len(other))


def slow_sqnr(reference, other):
    """SQNR of two arrays in dB."""
    pairs = [(float(a), float(b)) for a, b in zip(reference.ravel(), other.ravel(), strict=True)]
    return 10 * math.log10(math.fsum(a * a for a, _ in pairs) / math.fsum((b - a) ** 2 for a, b in pairs))


def slow_argmax(row):
    """Index of the first of the largest values."""
    best = 0
    for index, value in enumerate(row):
        if value > row[best]:
            best = index
    return best


@pytest.fixture(params=[1.0, 30.0, 1000.0], ids=["small", "usual", "large"])
def pair(request):
    """Logits of two runs that differ by noise, float32 [7, 50] each."""
    rng = np.random.default_rng(0)
    reference = (rng.standard_normal((7, 50)) * request.param).astype(np.float32)
    return reference, reference + rng.standard_normal((7, 50)).astype(np.float32) * np.float32(0.3)


def test_the_metrics_equal_their_definitions(pair):
    reference, other = pair
    np.testing.assert_allclose(
        kl_divergence(reference, other), [slow_kl(a, b) for a, b in zip(*pair, strict=True)], 1e-9, 1e-15
    )
    np.testing.assert_allclose(cosine(reference, other), [slow_cosine(a, b) for a, b in zip(*pair, strict=True)], 1e-12)
    ratios = [10 ** (-slow_sqnr(a, b) / 10) for a, b in zip(*pair, strict=True)]
    assert token_sqnr_db(reference, other) == pytest.approx(-10 * math.log10(sum(ratios) / len(ratios)), rel=1e-9)
    assert top1_agreement(reference, other).tolist() == [
        slow_argmax(a) == slow_argmax(b) for a, b in zip(*pair, strict=True)
    ]


def test_kl_of_two_tokens_has_the_known_value():
    # p = (3/4, 1/4), q = (1/2, 1/2)
    divergence = kl_divergence(np.log([[3.0, 1.0]]), np.zeros((1, 2)))
    assert divergence == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-12)


def test_kl_takes_the_reference_first():
    sure, unsure = np.array([[10.0, 0.0, 0.0]]), np.zeros((1, 3))
    assert kl_divergence(unsure, sure)[0] > 3 * kl_divergence(sure, unsure)[0]


def test_a_shift_of_all_logits_leaves_kl_at_zero(pair):
    reference, _ = pair
    assert kl_divergence(reference, reference + np.float32(2.0)).max() < 1e-6
    assert (kl_divergence(reference, reference) == 0).all()


def test_ten_percent_noise_is_20_db():
    assert token_sqnr_db(np.array([[3.0, -4.0]]), np.array([[3.3, -4.4]])) == pytest.approx(20.0)
    assert measure(np.array([[3.0, -4.0]]), np.array([[3.3, -4.4]])).sqnr_db == pytest.approx(20.0)


def test_sqnr_without_noise_and_without_signal():
    ones, zeros = np.ones((1, 3), np.float32), np.zeros((1, 3), np.float32)
    assert token_sqnr_db(ones, ones) == measure(ones, ones).sqnr_db == math.inf
    assert measure(zeros, ones).sqnr_db == -math.inf
    assert math.isnan(token_sqnr_db(ones[:0], ones[:0]))


def test_a_massive_row_does_not_decide_the_sqnr():
    reference = np.ones((10, 4), np.float32)
    reference[0] = 1e4
    other = reference.copy()
    other[1:] += 0.1
    assert token_sqnr_db(reference, other) == pytest.approx(20 + 10 * math.log10(10 / 9), abs=0.01)
    assert measure(reference, other).sqnr_db > 90


def test_sqnr_of_float16_does_not_overflow():
    reference = np.full((1, 4), 60000.0, np.float16)
    assert token_sqnr_db(reference, -reference) == pytest.approx(10 * math.log10(1 / 4))
    assert measure(reference, -reference).sqnr_db == pytest.approx(10 * math.log10(1 / 4))


def test_cosine_of_parallel_orthogonal_and_zero_rows():
    reference = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    other = np.array([[5.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert cosine(reference, other).tolist() == [1.0, 0.0, -1.0, 1.0, 0.0]


def test_ties_in_top1_go_to_the_first_token():
    assert top1_agreement(np.array([[1.0, 1.0]]), np.array([[0.0, 1.0]])).tolist() == [False]
    assert top1_agreement(np.array([[1.0, 1.0]]), np.array([[2.0, 2.0]])).tolist() == [True]


def test_sums_over_pieces_equal_those_of_the_whole(pair, monkeypatch):
    reference, other = pair
    whole = measure(reference, other)
    monkeypatch.setattr(metrics, "ROWS_AT_ONCE", 2)
    pieces = measure(reference, other)
    parts = measure(reference[:3], other[:3]) + measure(reference[3:], other[3:])
    for sums in (whole, pieces, parts):
        assert (sums.tokens, sums.not_finite) == (7, 0)
        assert sums.agreement == top1_agreement(reference, other).mean()
        assert sums.mean_kl == pytest.approx(kl_divergence(reference, other).mean(), rel=1e-12)
        assert sums.mean_cosine == pytest.approx(cosine(reference, other).mean(), rel=1e-12)
        assert sums.sqnr_db == pytest.approx(slow_sqnr(reference, other), rel=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_agrees_with_nothing(pair, value):
    reference, other = pair
    damaged = reference.copy()
    damaged[2, 5] = value
    sums = measure(reference, damaged)
    assert (sums.tokens, sums.not_finite) == (6, 1)
    assert sums.agreement == 6 / 7
    assert (sums.mean_kl, sums.sqnr_db) == (0.0, math.inf)
    assert measure(damaged, other).not_finite == 1


def test_means_without_tokens_are_nan():
    sums = measure(np.zeros((0, 5), np.float32), np.zeros((0, 5), np.float32))
    assert sums == Sums()
    assert all(math.isnan(v) for v in (sums.mean_kl, sums.agreement, sums.mean_cosine, sums.sqnr_db))


def test_logits_of_different_shapes_are_refused(pair):
    reference, other = pair
    with pytest.raises(ValueError, match=r"\(7, 50\) against \(6, 50\)"):
        measure(reference, other[:6])
