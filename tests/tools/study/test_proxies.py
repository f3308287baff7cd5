"""Proxies of cross-layer dependency on examples computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tools.study.proxies import error_cosine, flatness, lookahead_regret, quantization_error


def test_quantization_error_is_relative_to_the_energy_of_the_values():
    values = torch.tensor([1.0, 1.4, -2.0])
    assert quantization_error(values, 1.0, 4) == pytest.approx(0.16 / (1 + 1.96 + 4))
    assert quantization_error(values * 8, 8.0, 4) == pytest.approx(0.16 / 6.96)
    assert quantization_error(torch.tensor([20.0]), 1.0, 4) == pytest.approx((13 / 20) ** 2)  # clipped to 7
    assert quantization_error(torch.zeros(3), 1.0, 4) == 0.0


def test_error_cosine_tells_amplifying_from_cancelling_errors():
    one = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    assert error_cosine(one, 3 * one) == pytest.approx(1)
    assert error_cosine(one, -one) == pytest.approx(-1)
    assert error_cosine(one, one.flip(1)) == pytest.approx(0)
    assert error_cosine(one, torch.zeros(2, 2)) == 0.0


def test_lookahead_regret_is_the_relative_error_increase_at_the_next_layer():
    assert lookahead_regret([3, 1, 2], [4, 6, 5]) == pytest.approx(0.5)  # chooses 6, where 4 was possible
    assert lookahead_regret([3, 1, 2], [9, 2, 8]) == 0.0
    assert lookahead_regret([1, 2], [1, 0]) == math.inf


def test_flatness_is_the_best_error_over_the_second_best():
    assert flatness([4, 1, 2]) == 0.5
    assert flatness([1, 1, 5]) == 1.0
    assert flatness([0, 0]) == 1.0
