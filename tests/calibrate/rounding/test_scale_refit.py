"""Scales fitted to codes: the least squares that numpy finds row by row, held and bounded where codes say nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.quantization.quantizer import covering_scale, expand_scales, round_to_codes
from qvlm_export.calibrate.rounding import scale_refit
from qvlm_export.calibrate.rounding.scale_refit import MAX_CHANGE, refit_scales

INT4 = LinearScheme(weight_bits=4, activation_bits=None, group_size=64)
SCHEMES = (INT4, LinearScheme(3, None, 64), LinearScheme(6, 6, None), W8A8)


def problem(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [rows, columns] and the Hessian of correlated inputs, [columns, columns]."""
    generator = torch.Generator().manual_seed(seed)
    weight, inputs = (torch.randn(n, columns, generator=generator) for n in (rows, 2 * columns))
    inputs = inputs + 0.5 * inputs.roll(1, 1)
    return weight, inputs.T @ inputs


def error(
    weight: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, damping: float = 0.0
) -> torch.Tensor:
    """e (H + damping I) e^T of each row, float64."""
    e = weight.double() - codes.double() * expand_scales(scale, weight.shape[1]).double()
    return ((e @ hessian.double()) * e).sum(1) + damping * e.square().sum(1)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 7),
    groups=st.integers(1, 3),
    seed=st.integers(0, 9),
    scheme=st.sampled_from(SCHEMES),
    damping=st.sampled_from([0.0, 30.0]),
)
def test_fitted_scales_are_those_of_least_squares(
    rows: int, groups: int, seed: int, scheme: LinearScheme, damping: float
) -> None:
    weight, hessian = problem(rows, 64 * groups, seed)
    before = covering_scale(weight, scheme)
    codes = round_to_codes(weight, before, scheme)
    scale = refit_scales(weight, hessian, codes, before, scheme, damping=damping)
    assert (scale.dtype, scale.shape) == (before.dtype, before.shape)
    root = np.linalg.cholesky(hessian.double().numpy() + damping * np.eye(64 * groups)).T
    for row in range(rows):
        parts = codes[row].double().numpy().reshape(before[row].numel(), -1)
        columns = np.zeros((len(parts), 64 * groups))
        for group, part in enumerate(parts):
            columns[group, group * len(part) : (group + 1) * len(part)] = part
        solution = np.linalg.lstsq(root @ columns.T, root @ weight[row].double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(scale[row].double().numpy().ravel(), solution, rtol=3e-3)
    assert (error(weight, hessian, codes, scale, damping) <= 1.0005 * error(weight, hessian, codes, before, damping)).all()


def test_a_group_whose_codes_are_all_zero_keeps_its_scale() -> None:
    weight, hessian = problem(3, 128, 0)
    before = covering_scale(weight, INT4)
    codes = round_to_codes(weight, before, INT4)
    codes[1, 64:] = 0
    codes[2] = 0
    scale = refit_scales(weight, hessian, codes, before, INT4)
    assert torch.equal(scale[2], before[2])
    assert scale[1, 1] == before[1, 1]
    assert scale[1, 0] != before[1, 0]


def test_no_scale_changes_by_more_than_a_quarter() -> None:
    weight, hessian = problem(4, 64, 1)
    before = covering_scale(weight, INT4)
    codes = round_to_codes(weight, before, INT4)
    for factor, bound in ((3.0, 1 + MAX_CHANGE), (0.2, 1 - MAX_CHANGE)):
        scale = refit_scales(weight * factor, hessian, codes, before, INT4)
        torch.testing.assert_close(scale.float(), before.float() * bound, rtol=1e-3, atol=0.0)


def test_the_same_bits_on_any_number_of_threads_and_in_any_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(300, 128, 2)
    before = covering_scale(weight, INT4)
    codes, threads, results = round_to_codes(weight, before, INT4), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(refit_scales(weight, hessian, codes, before, INT4))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])
    monkeypatch.setattr(scale_refit, "_ROWS", 37)
    torch.testing.assert_close(refit_scales(weight, hessian, codes, before, INT4), results[0], rtol=2e-3, atol=0.0)
