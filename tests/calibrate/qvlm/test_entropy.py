"""The soft-assignment entropy against a loop over all values and levels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm_export.calibrate.quantization.observers import make_histogram
from qvlm_export.calibrate.qvlm.entropy import entropy_nats, histogram_entropy, soft_code_distribution

BITS = st.sampled_from([3, 4, 6, 8])


def code_entropy(values, scale, num_bits):
    return entropy_nats(soft_code_distribution(values, scale, num_bits))


def slow_distribution(values, scale, num_bits):
    """p(x = q_m) = softmax_m(-((x - q_m) / scale)^2) over all levels, averaged over the values."""
    levels = [m * scale for m in range(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1))]
    mean = [0.0] * len(levels)
    for x in values:
        exponents = [-(((x - q) / scale) ** 2) for q in levels]
        top = max(exponents)
        weights = [math.exp(e - top) for e in exponents]
        for m, weight in enumerate(weights):
            mean[m] += weight / sum(weights) / len(values)
    return mean


def drawn(seed, size=40):
    return (np.random.default_rng(seed).standard_t(3, size) * 2.0).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), BITS, st.floats(0.02, 3.0))
def test_distribution_and_entropy_are_those_of_the_slow_loop(seed, num_bits, scale):
    values = drawn(seed, 12)
    slow = slow_distribution(values.tolist(), scale, num_bits)
    np.testing.assert_allclose(soft_code_distribution(torch.tensor(values), scale, num_bits), slow, atol=1e-12)
    entropy = -sum(p * math.log(p) for p in slow if p > 0)
    assert code_entropy(torch.tensor(values), scale, num_bits) == pytest.approx(entropy, abs=1e-9)
    assert 0 <= entropy <= num_bits * math.log(2) + 1e-9


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), BITS, st.floats(1e-6, 1e6))
def test_scale_free(seed, num_bits, factor):
    values = torch.tensor(drawn(seed), dtype=torch.float64)
    assert code_entropy(values * factor, 0.3 * factor, num_bits) == pytest.approx(
        code_entropy(values, 0.3, num_bits), abs=1e-9
    )
    wrong = code_entropy(values * 3, 0.3, num_bits)  # the test can tell: another step is another entropy
    assert abs(wrong - code_entropy(values, 0.3, num_bits)) > 1e-6


def test_known_entropies():
    one = torch.tensor([0.0])
    weights = [math.exp(-(m**2)) for m in range(-8, 8)]
    shares = [w / sum(weights) for w in weights]
    assert code_entropy(one, 1.0, 4) == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert code_entropy(torch.tensor([1e6]), 1.0, 4) == pytest.approx(0.0, abs=1e-6)  # all the way in the last code
    spread = torch.arange(-8.0, 8.0)
    assert code_entropy(spread, 1.0, 4) == pytest.approx(math.log(16), abs=0.01)
    assert entropy_nats(torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)) == pytest.approx(math.log(2))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 6, 8]), st.floats(0.3, 1.0))
def test_the_histogram_gives_the_same_entropy(seed, num_bits, fraction):
    values = drawn(seed, 300)
    scale = float(np.abs(values).max()) * fraction / (2 ** (num_bits - 1) - 1)
    # Its bins are at least 64 times finer than a step of 8 bits that covers the largest value.
    assert histogram_entropy(make_histogram(values), scale, num_bits) == pytest.approx(
        code_entropy(torch.tensor(values), scale, num_bits), abs=2e-3
    )


def test_many_values_are_assigned_in_parts():
    values = torch.tensor(drawn(0, 1000))
    many = values.repeat(300)  # more than a part
    np.testing.assert_allclose(
        soft_code_distribution(many, 0.2, 6), soft_code_distribution(values, 0.2, 6), rtol=1e-9, atol=1e-15
    )
