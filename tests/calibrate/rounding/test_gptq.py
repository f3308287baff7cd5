"""GPTQ rounding and output matching (ridge regression), against slow reference implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.quantization.hessian import DAMPING, factor_hessian
from qvlm_export.calibrate.quantization.quantizer import (
    expand_scales,
    group_amax,
    round_to_codes,
    weight_scale,
)
from qvlm_export.calibrate.rounding import gptq
from qvlm_export.calibrate.rounding.gptq import gptq_round
from qvlm_export.calibrate.rounding.output_matching import SOLVED_ROWS, match_outputs, match_outputs_by_tokens

INT4 = LinearScheme(weight_bits=4, activation_bits=None, group_size=64)


def problem(seed: int, rows: int = 6, columns: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [rows, columns] and correlated inputs [tokens, columns]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(400, columns, generator=generator) @ (mix + 0.3 * torch.eye(columns))
    return torch.randn(rows, columns, generator=generator) * 0.05, inputs


def slow_gptq(weight: np.ndarray, hessian: np.ndarray, scale: np.ndarray, scheme: LinearScheme) -> np.ndarray:
    """GPTQ one column at a time, inverting the Hessian of the columns not rounded yet anew each time."""
    damped = hessian + DAMPING * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    target, codes = weight.copy(), np.zeros_like(weight)
    remaining = list(np.argsort(-np.diag(hessian), kind="stable"))
    while remaining:
        inverse = np.linalg.inv(damped[np.ix_(remaining, remaining)])
        column, others = remaining[0], remaining[1:]
        codes[:, column] = np.clip(np.round(target[:, column] / scale[:, column]), scheme.qmin, scheme.qmax)
        error = (target[:, column] - codes[:, column] * scale[:, column]) / inverse[0, 0]
        target[:, others] -= error[:, None] * inverse[0, 1:]
        remaining = others
    return codes.astype(np.int8)


@pytest.mark.parametrize("scheme", [INT4, W8A8], ids=["int4", "int8"])
def test_gptq_codes_equal_the_slow_reference(scheme):
    weight, inputs = problem(0)
    hessian = inputs.T @ inputs
    scale = weight_scale(group_amax(weight, scheme) * 0.9, scheme)
    codes = gptq_round(weight, factor_hessian(hessian), scale, scheme)
    scales = expand_scales(scale, weight.shape[1]).double().numpy()
    expected = slow_gptq(weight.double().numpy(), hessian.double().numpy(), scales, scheme)
    # float32 against float64: a value that lies on a rounding edge may fall the other way
    assert (codes.numpy() != expected).mean() < 0.01
    assert np.abs(codes.numpy().astype(int) - expected).max() <= 1


def test_block_sizes_do_not_change_the_codes(monkeypatch):
    weight, inputs = problem(11, rows=40)
    factor, scale = factor_hessian(inputs.T @ inputs), weight_scale(group_amax(weight, INT4), INT4)
    codes = gptq_round(weight, factor, scale, INT4)
    for block, far in ((128, 128), (16, 48), (5, 35), (1, 1)):
        monkeypatch.setattr(gptq, "BLOCK_COLUMNS", block)
        monkeypatch.setattr(gptq, "FAR_COLUMNS", far)
        # Only values on the edge between two codes may differ.
        assert (gptq_round(weight, factor, scale, INT4) != codes).float().mean() < 0.005


@pytest.mark.parametrize("seed", range(5))
def test_gptq_output_error_is_below_that_of_round_to_nearest(seed):
    weight, inputs = problem(seed, rows=32)
    hessian = inputs.T @ inputs
    scale = weight_scale(group_amax(weight, INT4), INT4)
    scales = expand_scales(scale, weight.shape[1])

    def error(codes: torch.Tensor) -> float:
        return float(((codes.float() * scales - weight) @ inputs.T).square().sum())

    assert error(gptq_round(weight, factor_hessian(hessian), scale, INT4)) < 0.7 * error(round_to_codes(weight, scale, INT4))


def test_gptq_rounds_columns_of_zero_inputs_to_nearest():
    weight, _ = problem(1)
    hessian = torch.zeros(128, 128)
    hessian[0, 0] = 1.0
    scale = weight_scale(group_amax(weight, INT4), INT4)
    codes = gptq_round(weight, factor_hessian(hessian), scale, INT4)
    assert (codes == round_to_codes(weight, scale, INT4)).float().mean() > 0.95


def test_output_matching_minimizes_its_objective():
    weight, inputs = problem(2)
    quantized_inputs = inputs + 0.1 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(3))
    hessian, cross_product, ridge = quantized_inputs.T @ quantized_inputs, inputs.T @ quantized_inputs, 0.05
    regularization = ridge * float(hessian.diagonal().mean())
    variable = weight.clone().requires_grad_()
    matched = match_outputs(weight, hessian, weight @ cross_product, ridge)
    variable.data.copy_(matched)
    output_error = (weight @ inputs.T - variable @ quantized_inputs.T).square().sum()
    objective = output_error + regularization * (variable - weight).square().sum()
    objective.backward()
    assert float(variable.grad.abs().max()) < 1e-3 * objective.item()
    assert objective.item() < float((weight @ inputs.T - weight @ quantized_inputs.T).square().sum())


@pytest.mark.parametrize("outputs", [6, 200])  # fewer than inputs, and more than inputs
@pytest.mark.parametrize("tokens", [40, 300])
def test_output_matching_by_tokens_equals_that_by_inputs(outputs, tokens):
    weight, inputs = problem(10, rows=outputs)
    quantized_inputs = inputs + 0.1 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(3))
    token_weights = torch.rand(tokens, generator=torch.Generator().manual_seed(4)) + 0.1
    x, x_q = (rows[:tokens].double() * token_weights.sqrt()[:, None] for rows in (inputs, quantized_inputs))
    weight, hessian = weight.double(), x_q.T @ x_q
    matched = match_outputs_by_tokens(weight, x, x_q, hessian, 0.05)
    torch.testing.assert_close(matched, match_outputs(weight, hessian, weight @ (x.T @ x_q), 0.05), rtol=1e-7, atol=1e-9)
    assert float((matched - weight).norm()) > 1e-3 * float(weight.norm())


def test_a_strong_ridge_leaves_the_weight_unchanged():
    weight, inputs = problem(4)
    hessian = inputs.T @ inputs
    torch.testing.assert_close(match_outputs(weight, hessian, 0.5 * weight @ hessian, 1e6), weight, rtol=1e-3, atol=1e-5)


def test_output_matching_leaves_the_weight_unchanged_if_inputs_are_zero():
    weight, _ = problem(5)
    zeros = torch.zeros(128, 128)
    torch.testing.assert_close(match_outputs(weight, zeros, weight @ zeros, 1.0), weight)


def test_residual_energy_equals_that_of_the_papers_factor():
    """For the column rounded last, which nothing can compensate, it is the column's own energy."""
    _, inputs = problem(6)
    hessian = inputs.T @ inputs
    energy = factor_hessian(hessian).residual_energy()
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(128, dtype=torch.float64)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)  # U of the paper
    expected = upper.diagonal().square().reciprocal().float()
    torch.testing.assert_close(energy[order], expected, rtol=1e-4, atol=0.0)
    last = int(order[-1])
    assert float(energy[last]) == pytest.approx(float(damped[last, last]), rel=1e-5)


def test_output_matching_gives_the_same_bits_on_any_number_of_threads():
    torch.manual_seed(9)
    inputs, weight = torch.randn(300, 48), torch.randn(2 * SOLVED_ROWS + 5, 48)
    hessian, cross_term = inputs.T @ inputs, weight @ (inputs.T @ inputs) + torch.randn(2 * SOLVED_ROWS + 5, 48)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(match_outputs(weight, hessian, cross_term, 0.5))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
    regularization = 0.5 * hessian.diagonal().mean() * torch.eye(48)
    expected = torch.linalg.solve((hessian + regularization).double(), (cross_term + weight @ regularization).double().T).T
    torch.testing.assert_close(results[0], expected.float(), rtol=1e-4, atol=1e-4)
