"""Coordinate descent on codes and scales, against a slow loop over single codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.gptq import DAMPING, column_scales, gptq_round, make_rounder
from calibrate.quantize import group_amax, round_to_codes, weight_scale
from calibrate.refine import Rounded, refine
from calibrate.scheme import W8A8, LinearScheme

INT4 = LinearScheme(weight_bits=4, activation_bits=None, group_size=64)
INT3 = LinearScheme(weight_bits=3, activation_bits=None, group_size=64)
SCHEMES = [INT4, INT3, W8A8]


def problem(seed: int, rows: int = 6, columns: int = 192) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [rows, columns] and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(400, columns, generator=generator) @ (mix + 0.3 * torch.eye(columns))
    return torch.randn(rows, columns, generator=generator) * 0.05, inputs.T @ inputs


def cost(weight: torch.Tensor, gram: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """Of each row, with the damping, in float64."""
    metric = gram.double().numpy() + DAMPING * float(gram.diagonal().double().mean()) * np.eye(len(gram))
    error = (weight - codes.float() * column_scales(scale, weight.shape[1])).double().numpy()
    return np.einsum("oi,ij,oj->o", error, metric, error)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), scheme=st.sampled_from(SCHEMES), part=st.floats(0.5, 1.0), nearest=st.booleans())
def test_no_row_gets_worse(seed: int, scheme: LinearScheme, part: float, nearest: bool):
    weight, gram = problem(seed)
    scale = weight_scale(group_amax(weight, scheme) * part, scheme)
    codes = round_to_codes(weight, scale, scheme) if nearest else gptq_round(weight, make_rounder(gram), scale, scheme)
    after = refine(weight, gram, Rounded(codes, scale, scheme), 2)
    found, stored = after.codes, after.scale
    assert (cost(weight, gram, found, stored) <= cost(weight, gram, codes, scale) * (1 + 1e-4)).all()
    assert found.dtype == torch.int8
    assert stored.dtype == scale.dtype
    assert stored.shape == scale.shape
    assert scheme.qmin <= int(found.min()) <= int(found.max()) <= scheme.qmax


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.weight_bits} bits")
def test_what_gptq_leaves_becomes_clearly_less(scheme):
    weight, gram = problem(1, rows=32)
    scale = weight_scale(group_amax(weight, scheme), scheme)
    codes = gptq_round(weight, make_rounder(gram), scale, scheme)
    after = refine(weight, gram, Rounded(codes, scale, scheme), 3)
    found, stored = after.codes, after.scale
    assert cost(weight, gram, found, stored).sum() < 0.95 * cost(weight, gram, codes, scale).sum()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.weight_bits} bits")
def test_the_end_is_one_that_no_single_code_improves(scheme):
    weight, gram = problem(2, rows=2)
    scale = weight_scale(group_amax(weight, scheme), scheme)
    after = refine(weight, gram, Rounded(round_to_codes(weight, scale, scheme), scale, scheme), 30)
    found, stored = after.codes, after.scale
    least = cost(weight, gram, found, stored)
    for column in range(weight.shape[1]):
        for change in (-1, 1):
            other = found.clone()
            other[:, column] = (other[:, column] + change).clamp(scheme.qmin, scheme.qmax)
            assert (cost(weight, gram, other, stored) >= least * (1 - 1e-5)).all()


def test_inputs_that_are_always_zero_change_nothing_and_stay_finite():
    weight, _ = problem(3)
    scale = weight_scale(group_amax(weight, INT4), INT4)
    codes = round_to_codes(weight, scale, INT4)
    after = refine(weight, torch.zeros(192, 192), Rounded(codes, scale, INT4), 2)
    found, stored = after.codes, after.scale
    assert np.isfinite(stored.numpy()).all()
    assert (cost(weight, torch.eye(192), found, stored) <= cost(weight, torch.eye(192), codes, scale) * (1 + 1e-4)).all()
