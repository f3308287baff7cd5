"""Linears that share an input: what aiming and rounding them together changes, which is nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.quantization.config import EXPECTED_ERROR_LINEAR, KRONECKER_LINEAR, LinearConfig
from qvlm_export.calibrate.rounding import quantize_linears as group
from qvlm_export.calibrate.rounding.output_hessian import add_gradients, empty_output_hessian
from qvlm_export.calibrate.rounding.output_matching import match_outputs
from qvlm_export.calibrate.rounding.quantize_linears import LayerInputs, quantize_linears

INT4 = LinearScheme(4, None, 32)
LINEARS = {"q": 40, "k": 24, "v": 24}


@pytest.fixture
def rows() -> LayerInputs:
    torch.manual_seed(0)
    wanted = torch.randn(300, 64) @ torch.randn(64, 64)
    return LayerInputs(wanted, wanted + 0.05 * torch.randn(300, 64), torch.rand(300) + 0.5)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(out, 64) / 8 for name, out in LINEARS.items()}


@pytest.mark.parametrize("out", [30, 64, 200])
def test_aiming_the_identity_aims_the_weight(rows: LayerInputs, monkeypatch: pytest.MonkeyPatch, out: int) -> None:
    weight = torch.randn(out, 64)
    given = weight, rows.quantized_rows, rows.scale_by_weights(rows.quantized_rows).T @ rows.quantized_rows, 0.5
    wanted = rows.match_outputs(*given)
    monkeypatch.setattr(group, "WIDE_INPUT", 1)
    found = rows.match_outputs(*given)
    assert torch.norm(found - wanted) < 1e-4 * torch.norm(wanted)
    assert torch.equal(found, wanted) == (out <= 64)  # only then it takes the other way


def test_inputs_of_other_bits_have_other_ranges(rows: LayerInputs, weights: dict[str, torch.Tensor]) -> None:
    """Linears that share an input, some of which read it in 8 bits, in 4, or as it is."""
    plan = {"q": W8A8, "k": LinearScheme(8, 4, None), "v": INT4}
    together = quantize_linears(weights, plan, EXPECTED_ERROR_LINEAR, rows)
    assert list(together) == list(weights)
    for name, weight in weights.items():
        alone = quantize_linears({name: weight}, plan, EXPECTED_ERROR_LINEAR, rows)[name]
        assert np.array_equal(together[name].codes, alone.codes)
        assert np.array_equal(together[name].scale, alone.scale)
        assert together[name].input_scale == alone.input_scale
    assert together["k"].input_scale > 4 * together["q"].input_scale
    assert together["v"].input_scale is None


@pytest.mark.parametrize("out", [30, 200])
def test_fewer_tokens_than_inputs_are_aimed_by_tokens(rows: LayerInputs, monkeypatch: pytest.MonkeyPatch, out: int) -> None:
    assert rows.weights is not None
    few, weight = LayerInputs(rows.float_rows[:40], rows.quantized_rows[:40], rows.weights[:40]), torch.randn(out, 64)
    gram = few.scale_by_weights(few.quantized_rows).T @ few.quantized_rows
    wanted = match_outputs(weight, gram, few.cross_term(few.scale_by_weights(few.quantized_rows), weight), 0.5)
    monkeypatch.setattr(group, "match_outputs", None)
    assert torch.norm(few.match_outputs(weight, few.quantized_rows, gram, 0.5) - wanted) < 1e-4 * torch.norm(wanted)


@pytest.mark.parametrize(
    "variant",
    [
        EXPECTED_ERROR_LINEAR,
        KRONECKER_LINEAR,
        LinearConfig("absmax", "rounded"),
        LinearConfig("absmax", "absmax", "nearest"),
    ],
)
def test_linears_of_one_input_are_rounded_as_if_alone(
    rows: LayerInputs, weights: dict[str, torch.Tensor], variant: LinearConfig
) -> None:
    generator = torch.Generator().manual_seed(2)
    metrics = {
        name: add_gradients(empty_output_hessian(out), torch.randn(50, out, generator=generator), generator)
        for name, out in LINEARS.items()
    }
    together = quantize_linears(weights, dict.fromkeys(weights, INT4), variant, rows, metrics)
    assert list(together) == list(weights)
    for name, weight in weights.items():
        alone = quantize_linears({name: weight}, {name: INT4}, variant, rows, metrics)[name]
        # Aimed together, a value between two codes may fall to either.
        assert (together[name].codes != alone.codes).mean() < 0.01
        np.testing.assert_allclose(together[name].scale, alone.scale, rtol=2e-3)


def test_each_linear_keeps_its_own_scheme(rows: LayerInputs, weights: dict[str, torch.Tensor]) -> None:
    plan = {"q": INT4, "k": W8A8, "v": INT4}
    found = quantize_linears(weights, plan, EXPECTED_ERROR_LINEAR, rows)
    assert {name: linear.scheme for name, linear in found.items()} == plan
    assert [found[name].input_scale is None for name in found] == [True, False, True]
    assert {name: linear.codes.shape for name, linear in found.items()} == {name: (out, 64) for name, out in LINEARS.items()}


def test_a_range_suits_the_outputs_whose_errors_count() -> None:
    """One output reads a channel of rare large values, the other all else: who counts decides whether they are clipped."""
    torch.manual_seed(3)
    seen = torch.randn(300, 64)
    seen[:, 0] = torch.where(torch.rand(300) < 0.02, 30.0, 0.1)
    weight = torch.zeros(2, 64)
    weight[0, 0], weight[1, 1:] = 1.0, 1.0
    scales = {}
    for counting in range(2):
        metric = torch.zeros(2, 2)
        metric[counting, counting] = 1.0
        found = quantize_linears({"q": weight}, {"q": W8A8}, KRONECKER_LINEAR, LayerInputs(seen, seen), {"q": metric})
        scales[counting] = found["q"].input_scale
    assert scales[0] is not None
    assert scales[1] is not None
    assert scales[0] > 1.2 * scales[1]
