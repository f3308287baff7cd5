"""GPTQ and the ridge towards the float output, against slow formulations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.quantization.hessian import DAMPING, factor_hessian, gptq_residual_energy
from qvlm_export.calibrate.quantization.quantizer import (
    covering_scale,
    expand_scales,
    group_amax,
    round_to_codes,
    stored_weight_scale,
    weight_scale,
)
from qvlm_export.calibrate.rounding import gptq
from qvlm_export.calibrate.rounding.gptq import FRACTIONS, gptq_round, search_gptq_scale
from qvlm_export.calibrate.rounding.output_matching import SOLVED_ROWS, match_outputs, match_outputs_by_tokens

INT4 = LinearScheme(weight_bits=4, activation_bits=None, group_size=64)


def problem(seed: int, rows: int = 6, columns: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [rows, columns] and correlated inputs [tokens, columns]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(400, columns, generator=generator) @ (mix + 0.3 * torch.eye(columns))
    return torch.randn(rows, columns, generator=generator) * 0.05, inputs


def slow_gptq(weight: np.ndarray, gram: np.ndarray, scale: np.ndarray, scheme: LinearScheme) -> np.ndarray:
    """One column at a time, the inverse of the columns still free computed anew each time."""
    damped = gram + DAMPING * np.mean(np.diag(gram)) * np.eye(len(gram))
    left, codes = weight.copy(), np.zeros_like(weight)
    free = list(np.argsort(-np.diag(gram), kind="stable"))
    while free:
        inverse = np.linalg.inv(damped[np.ix_(free, free)])
        column, others = free[0], free[1:]
        codes[:, column] = np.clip(np.round(left[:, column] / scale[:, column]), scheme.qmin, scheme.qmax)
        error = (left[:, column] - codes[:, column] * scale[:, column]) / inverse[0, 0]
        left[:, others] -= error[:, None] * inverse[0, 1:]
        free = others
    return codes.astype(np.int8)


@pytest.mark.parametrize("scheme", [INT4, W8A8], ids=["int4", "int8"])
def test_codes_equal_the_slow_reference(scheme):
    weight, inputs = problem(0)
    gram = inputs.T @ inputs
    scale = weight_scale(group_amax(weight, scheme) * 0.9, scheme)
    got = gptq_round(weight, factor_hessian(gram), scale, scheme)
    spread = expand_scales(scale, weight.shape[1]).double().numpy()
    wanted = slow_gptq(weight.double().numpy(), gram.double().numpy(), spread, scheme)
    # float32 against float64: a value that lies on a rounding edge may fall the other way
    assert (got.numpy() != wanted).mean() < 0.01
    assert np.abs(got.numpy().astype(int) - wanted).max() <= 1


def test_blocks_of_columns_do_not_show_in_the_codes(monkeypatch):
    weight, inputs = problem(11, rows=40)
    rounder, scale = factor_hessian(inputs.T @ inputs), weight_scale(group_amax(weight, INT4), INT4)
    whole = gptq_round(weight, rounder, scale, INT4)
    for block, far in ((128, 128), (16, 48), (5, 35), (1, 1)):
        monkeypatch.setattr(gptq, "BLOCK_COLUMNS", block)
        monkeypatch.setattr(gptq, "FAR_COLUMNS", far)
        assert (gptq_round(weight, rounder, scale, INT4) != whole).float().mean() < 0.005  # on the edge between two codes


@pytest.mark.parametrize("seed", range(5))
def test_output_error_is_below_round_to_nearest(seed):
    weight, inputs = problem(seed, rows=32)
    gram = inputs.T @ inputs
    scale = weight_scale(group_amax(weight, INT4), INT4)
    spread = expand_scales(scale, weight.shape[1])

    def error(codes: torch.Tensor) -> float:
        return float(((codes.float() * spread - weight) @ inputs.T).square().sum())

    assert error(gptq_round(weight, factor_hessian(gram), scale, INT4)) < 0.7 * error(round_to_codes(weight, scale, INT4))


def test_inputs_that_never_vary_do_not_break_it():
    weight, _ = problem(1)
    gram = torch.zeros(128, 128)
    gram[0, 0] = 1.0
    scale = weight_scale(group_amax(weight, INT4), INT4)
    codes = gptq_round(weight, factor_hessian(gram), scale, INT4)
    assert (codes == round_to_codes(weight, scale, INT4)).float().mean() > 0.95


def test_aimed_weight_minimises_its_objective():
    weight, inputs = problem(2)
    seen = inputs + 0.1 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(3))
    gram, cross, ridge = seen.T @ seen, inputs.T @ seen, 0.05
    held = ridge * float(gram.diagonal().mean())
    free = weight.clone().requires_grad_()
    aimed = match_outputs(weight, gram, weight @ cross, ridge)
    free.data.copy_(aimed)
    objective = (weight @ inputs.T - free @ seen.T).square().sum() + held * (free - weight).square().sum()
    objective.backward()
    assert float(free.grad.abs().max()) < 1e-3 * objective.item()
    assert objective.item() < float((weight @ inputs.T - weight @ seen.T).square().sum())


@pytest.mark.parametrize("outputs", [6, 200])  # fewer than inputs, and more
@pytest.mark.parametrize("tokens", [40, 300])
def test_aiming_by_tokens_is_aiming_by_inputs(outputs, tokens):
    weight, inputs = problem(10, rows=outputs)
    seen = inputs + 0.1 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(3))
    counts = torch.rand(tokens, generator=torch.Generator().manual_seed(4)) + 0.1
    wanted, seen = (rows[:tokens].double() * counts.sqrt()[:, None] for rows in (inputs, seen))
    weight, gram = weight.double(), seen.T @ seen
    found = match_outputs_by_tokens(weight, wanted, seen, gram, 0.05)
    torch.testing.assert_close(found, match_outputs(weight, gram, weight @ (wanted.T @ seen), 0.05), rtol=1e-7, atol=1e-9)
    assert float((found - weight).norm()) > 1e-3 * float(weight.norm())


def test_a_strong_ridge_keeps_the_weight():
    weight, inputs = problem(4)
    gram = inputs.T @ inputs
    torch.testing.assert_close(match_outputs(weight, gram, 0.5 * weight @ gram, 1e6), weight, rtol=1e-3, atol=1e-5)


def test_inputs_that_are_always_zero_leave_the_weight():
    weight, _ = problem(5)
    zeros = torch.zeros(128, 128)
    torch.testing.assert_close(match_outputs(weight, zeros, weight @ zeros, 1.0), weight)


def test_the_remaining_energy_is_what_the_papers_factor_says():
    """And of the column rounded last, for which nothing can make up, its own."""
    _, inputs = problem(6)
    gram = inputs.T @ inputs
    energy = gptq_residual_energy(gram)
    damped = gram.double() + DAMPING * gram.double().diagonal().mean() * torch.eye(128, dtype=torch.float64)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)  # the paper's
    wanted = upper.diagonal().square().reciprocal().float()
    torch.testing.assert_close(energy[order], wanted, rtol=1e-4, atol=0.0)
    last = int(order[-1])
    assert float(energy[last]) == pytest.approx(float(damped[last, last]), rel=1e-5)


@pytest.mark.parametrize("bits", [3, 4])
def test_ranges_are_chosen_for_each_output_by_what_rounding_leaves(bits):
    weight, inputs = problem(7, rows=40)
    scheme = LinearScheme(bits, None, 64)
    gram = inputs.T @ inputs
    rounder, whole = factor_hessian(gram), covering_scale(weight, scheme)
    scale = search_gptq_scale(weight, gram, rounder, whole, scheme)
    codes = gptq_round(weight, rounder, scale, scheme)

    def errors(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (((codes.float() * expand_scales(scale, 128)) - weight) @ inputs.T).square().sum(1)

    tried = [stored_weight_scale(whole.float() * fraction, scheme) for fraction in (1.0, *FRACTIONS)]
    each = torch.stack([errors(gptq_round(weight, rounder, s, scheme), s) for s in tried])
    torch.testing.assert_close(errors(codes, scale), each.amin(0), rtol=1e-3, atol=1e-6)
    chosen = {int(n) for n in each.argmin(0)}
    assert len(chosen) > 1  # not the same range for all
    for row in range(40):
        assert torch.equal(scale[row], tried[int(each[:, row].argmin())][row])


def test_scales_of_whole_rows_stay():
    weight, inputs = problem(8)
    gram = inputs.T @ inputs
    scale = covering_scale(weight, W8A8)
    assert torch.equal(search_gptq_scale(weight, gram, factor_hessian(gram), scale, W8A8), scale)


def test_many_outputs_are_aimed_by_several_threads_to_the_same_bits():
    torch.manual_seed(9)
    inputs, weight = torch.randn(300, 48), torch.randn(2 * SOLVED_ROWS + 5, 48)
    gram, pulled = inputs.T @ inputs, weight @ (inputs.T @ inputs) + torch.randn(2 * SOLVED_ROWS + 5, 48)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(match_outputs(weight, gram, pulled, 0.5))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    held = 0.5 * gram.diagonal().mean() * torch.eye(48)
    wanted = torch.linalg.solve((gram + held).double(), (pulled + weight @ held).double().T).T
    torch.testing.assert_close(found[0], wanted.float(), rtol=1e-4, atol=1e-4)
