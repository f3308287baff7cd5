"""Linears that share an input get the same codes together as one by one, by every formula of output matching."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.quantization.config import EXPECTED_ERROR_LINEAR, KRONECKER_LINEAR, LinearConfig
from qvlm_export.calibrate.rounding import quantize_linears as quantize_linears_module
from qvlm_export.calibrate.rounding.output_hessian import add_gradients, empty_output_hessian
from qvlm_export.calibrate.rounding.output_matching import match_outputs
from qvlm_export.calibrate.rounding.quantize_linears import LayerInputs, quantize_linears

INT4 = LinearScheme(4, None, 32)
LINEARS = {"q": 40, "k": 24, "v": 24}


@pytest.fixture
def rows() -> LayerInputs:
    torch.manual_seed(0)
    float_rows = torch.randn(300, 64) @ torch.randn(64, 64)
    return LayerInputs(float_rows, float_rows + 0.05 * torch.randn(300, 64), torch.rand(300) + 0.5)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(out, 64) / 8 for name, out in LINEARS.items()}


@pytest.mark.parametrize("out", [30, 64, 200])
def test_output_matching_of_the_identity_times_the_weight_equals_that_of_the_weight(
    rows: LayerInputs, monkeypatch: pytest.MonkeyPatch, out: int
) -> None:
    weight = torch.randn(out, 64)
    arguments = weight, rows.quantized_rows, rows.scale_by_weights(rows.quantized_rows).T @ rows.quantized_rows, 0.5
    expected = rows.match_outputs(*arguments)
    monkeypatch.setattr(quantize_linears_module, "WIDE_INPUT", 1)
    by_identity = rows.match_outputs(*arguments)
    assert torch.norm(by_identity - expected) < 1e-4 * torch.norm(expected)
    assert torch.equal(by_identity, expected) == (out <= 64)  # with more outputs than inputs the identity is matched


def test_linears_that_read_the_input_in_other_bits_have_their_own_range(
    rows: LayerInputs, weights: dict[str, torch.Tensor]
) -> None:
    """Of linears that share an input, one reads it in 8 bits, one in 4 and one as float."""
    schemes = {"q": W8A8, "k": LinearScheme(8, 4, None), "v": INT4}
    together = quantize_linears(weights, schemes, EXPECTED_ERROR_LINEAR, rows)
    assert list(together) == list(weights)
    for name, weight in weights.items():
        alone = quantize_linears({name: weight}, schemes, EXPECTED_ERROR_LINEAR, rows)[name]
        assert np.array_equal(together[name].codes, alone.codes)
        assert np.array_equal(together[name].scale, alone.scale)
        assert together[name].input_scale == alone.input_scale
    assert together["k"].input_scale > 4 * together["q"].input_scale
    assert together["v"].input_scale is None


@pytest.mark.parametrize("wide_input", [16, 1024])
def test_output_matching_makes_up_for_the_residual_gap(
    rows: LayerInputs, monkeypatch: pytest.MonkeyPatch, wide_input: int
) -> None:
    """A gap that the quantized input explains is matched exactly, by a weight that is moved by as much."""
    monkeypatch.setattr(quantize_linears_module, "WIDE_INPUT", wide_input)
    weight, moved = torch.randn(100, 64), torch.randn(100, 64)
    same = replace(rows, float_rows=rows.quantized_rows, residual_gap=rows.quantized_rows @ moved.T)
    hessian = same.scale_by_weights(same.quantized_rows).T @ same.quantized_rows
    matched = same.match_outputs(weight, same.quantized_rows, hessian, 1e-9)
    missed = same.quantized_rows @ (matched - weight - moved).T
    assert torch.norm(missed) < 1e-3 * torch.norm(same.residual_gap)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("out", [30, 200])
def test_output_matching_of_fewer_tokens_than_inputs_solves_by_tokens(
    rows: LayerInputs, monkeypatch: pytest.MonkeyPatch, out: int, residual: bool
) -> None:
    assert rows.weights is not None
    gap, weight = torch.randn(40, out) if residual else None, torch.randn(out, 64)
    few = LayerInputs(rows.float_rows[:40], rows.quantized_rows[:40], rows.weights[:40], gap)
    hessian = few.scale_by_weights(few.quantized_rows).T @ few.quantized_rows
    expected = match_outputs(weight, hessian, few.cross_term(few.scale_by_weights(few.quantized_rows), weight), 0.5)
    monkeypatch.setattr(quantize_linears_module, "match_outputs", None)
    assert torch.norm(few.match_outputs(weight, few.quantized_rows, hessian, 0.5) - expected) < 1e-4 * torch.norm(expected)


@pytest.mark.parametrize(
    "config",
    [
        EXPECTED_ERROR_LINEAR,
        KRONECKER_LINEAR,
        LinearConfig("absmax", "residual", refit_scales=True),
        LinearConfig("absmax", "absmax", "nearest"),
    ],
)
def test_linears_that_share_an_input_are_quantized_as_if_alone(
    rows: LayerInputs, weights: dict[str, torch.Tensor], config: LinearConfig
) -> None:
    generator = torch.Generator().manual_seed(2)
    output_hessians = {
        name: add_gradients(empty_output_hessian(out), torch.randn(50, out, generator=generator), generator)
        for name, out in LINEARS.items()
    }
    together = quantize_linears(weights, dict.fromkeys(weights, INT4), config, rows, output_hessians)
    assert list(together) == list(weights)
    for name, weight in weights.items():
        alone = quantize_linears({name: weight}, {name: INT4}, config, rows, output_hessians)[name]
        # After output matching of all together, a value between two codes may be rounded to either.
        assert (together[name].codes != alone.codes).mean() < 0.01
        np.testing.assert_allclose(together[name].scale, alone.scale, rtol=2e-3)


def test_each_linear_keeps_its_own_scheme(rows: LayerInputs, weights: dict[str, torch.Tensor]) -> None:
    schemes = {"q": INT4, "k": W8A8, "v": INT4}
    linears = quantize_linears(weights, schemes, EXPECTED_ERROR_LINEAR, rows)
    assert {name: linear.scheme for name, linear in linears.items()} == schemes
    assert [linears[name].input_scale is None for name in linears] == [True, False, True]
    assert {name: linear.codes.shape for name, linear in linears.items()} == {
        name: (out, 64) for name, out in LINEARS.items()
    }


def test_the_input_range_depends_on_the_output_hessian() -> None:
    """One output reads a channel of rare large values, the other output all other channels.

    If only the other output has gradients, the large values are clipped.
    """
    torch.manual_seed(3)
    quantized_rows = torch.randn(300, 64)
    quantized_rows[:, 0] = torch.where(torch.rand(300) < 0.02, 30.0, 0.1)
    weight = torch.zeros(2, 64)
    weight[0, 0], weight[1, 1:] = 1.0, 1.0
    scales, by_output = {}, replace(KRONECKER_LINEAR, by_output=True)
    for important in range(2):
        output_hessian = torch.zeros(2, 2)
        output_hessian[important, important] = 1.0
        inputs = LayerInputs(quantized_rows, quantized_rows)
        linears = quantize_linears({"q": weight}, {"q": W8A8}, by_output, inputs, {"q": output_hessian})
        scales[important] = linears["q"].input_scale
    assert scales[0] is not None
    assert scales[1] is not None
    assert scales[0] > 1.2 * scales[1]


def test_rows_of_weight_0_have_no_effect() -> None:
    generator = torch.Generator().manual_seed(0)
    x_q, x = torch.randn(2, 40, 8, generator=generator)
    weights = torch.ones(40)
    weights[25:] = 0
    weighted, few = LayerInputs(x, x_q, weights), LayerInputs(x[:25], x_q[:25])
    torch.testing.assert_close(weighted.scale_by_weights(x_q).T @ x_q, few.scale_by_weights(x_q[:25]).T @ x_q[:25])
    for out in (3, 20):  # fewer and more outputs than inputs, for which the products are taken in different orders
        weight = torch.randn(out, 8, generator=generator)
        torch.testing.assert_close(
            weighted.cross_term(weighted.scale_by_weights(x_q), weight), few.cross_term(x_q[:25], weight)
        )
        torch.testing.assert_close(few.cross_term(x_q[:25], weight), weight @ x[:25].T @ x_q[:25])
