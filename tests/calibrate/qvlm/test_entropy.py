"""The entropy of softly assigned codes against a loop over all values and levels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm_export.calibrate.quantization.observers import observe_rows
from qvlm_export.calibrate.qvlm.entropy import entropy_nats, histogram_entropy, soft_code_distribution

BITS = st.sampled_from([3, 4, 6, 8])


def code_entropy(values, scale, num_bits):
    return entropy_nats(soft_code_distribution(values, scale, num_bits))


def slow_distribution(values, scale, num_bits):
    """Returns p(x = q_m) = softmax_m(-((x - q_m) / scale)^2) over all levels, averaged over the values."""
    levels = [m * scale for m in range(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1))]
    mean = [0.0] * len(levels)
    for x in values:
        exponents = [-(((x - q) / scale) ** 2) for q in levels]
        top = max(exponents)
        weights = [math.exp(e - top) for e in exponents]
        for m, weight in enumerate(weights):
            mean[m] += weight / sum(weights) / len(values)
    return mean


def draw_values(seed, size=40):
    return (np.random.default_rng(seed).standard_t(3, size) * 2.0).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), BITS, st.floats(0.02, 3.0))
def test_distribution_and_entropy_equal_those_of_the_slow_loop(seed, num_bits, scale):
    values = draw_values(seed, 12)
    slow = slow_distribution(values.tolist(), scale, num_bits)
    np.testing.assert_allclose(soft_code_distribution(torch.tensor(values), scale, num_bits), slow, atol=1e-12)
    entropy = -sum(p * math.log(p) for p in slow if p > 0)
    assert code_entropy(torch.tensor(values), scale, num_bits) == pytest.approx(entropy, abs=1e-9)
    assert 0 <= entropy <= num_bits * math.log(2) + 1e-9


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), BITS, st.floats(1e-6, 1e6))
def test_entropy_does_not_depend_on_the_units_of_the_values(seed, num_bits, factor):
    values = torch.tensor(draw_values(seed), dtype=torch.float64)
    assert code_entropy(values * factor, 0.3 * factor, num_bits) == pytest.approx(
        code_entropy(values, 0.3, num_bits), abs=1e-9
    )
    rescaled = code_entropy(values * 3, 0.3, num_bits)  # values alone rescaled, to see that the test can fail
    assert abs(rescaled - code_entropy(values, 0.3, num_bits)) > 1e-6


def test_entropies_worked_out_by_hand():
    one = torch.tensor([0.0])
    weights = [math.exp(-(m**2)) for m in range(-8, 8)]
    shares = [w / sum(weights) for w in weights]
    assert code_entropy(one, 1.0, 4) == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert code_entropy(torch.tensor([1e6]), 1.0, 4) == pytest.approx(0.0, abs=1e-6)  # all of it in the last code
    spread = torch.arange(-8.0, 8.0)
    assert code_entropy(spread, 1.0, 4) == pytest.approx(math.log(16), abs=0.01)
    assert entropy_nats(torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)) == pytest.approx(math.log(2))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 6, 8]), st.floats(0.3, 1.0))
def test_a_histogram_has_the_entropy_of_its_values(seed, num_bits, fraction):
    values = draw_values(seed, 300)
    scale = float(np.abs(values).max()) * fraction / (2 ** (num_bits - 1) - 1)
    # Its bins are at least 64 times finer than a step of 8 bits that covers the largest value.
    assert histogram_entropy(
        observe_rows("values", torch.as_tensor(values).reshape(-1, 1)).histogram(), scale, num_bits
    ) == pytest.approx(code_entropy(torch.tensor(values), scale, num_bits), abs=2e-3)


def test_values_assigned_in_several_chunks_give_the_same_distribution():
    values = torch.tensor(draw_values(0, 1000))
    many = values.repeat(300)  # more than one chunk
    np.testing.assert_allclose(
        soft_code_distribution(many, 0.2, 6), soft_code_distribution(values, 0.2, 6), rtol=1e-9, atol=1e-15
    )
