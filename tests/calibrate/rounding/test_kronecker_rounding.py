"""Two-sided rounding, against an entry at a time and against what it is for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.quantization.hessian import HessianFactor, factor_hessian
from qvlm_export.calibrate.quantization.quantizer import covering_scale, expand_scales, round_to_codes
from qvlm_export.calibrate.rounding import kronecker_rounding, output_hessian
from qvlm_export.calibrate.rounding.gptq import gptq_round
from qvlm_export.calibrate.rounding.kronecker_rounding import factor_output_hessian, kronecker_round
from qvlm_export.calibrate.rounding.output_hessian import (
    DAMPING,
    add_gradients,
    empty_output_hessian,
    invert_cholesky,
    leverage_scores,
    root_output_importance,
    scale_output_hessian,
)

INT4 = LinearScheme(weight_bits=4, activation_bits=None, group_size=8)
CPU = torch.device("cpu")


def correlated(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + 0.2 * torch.eye(width)
    return torch.randn(count, width, generator=generator) @ (mix * 0.93 ** torch.arange(width)[:, None])  # few directions


def problem(out: int, into: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight [out, in], inputs [tokens, in], gradients [tokens, out]."""
    weight = torch.randn(out, into, generator=torch.Generator().manual_seed(seed)) * 0.05
    return weight, correlated(3 * into, into, seed + 1), correlated(3 * out, out, seed + 2)


def metric_of(gradients: torch.Tensor) -> torch.Tensor:
    return add_gradients(empty_output_hessian(gradients.shape[1]), gradients, torch.Generator())


def one_at_a_time(
    weight: torch.Tensor, columns: HessianFactor, rows: HessianFactor, scale: torch.Tensor, scheme: LinearScheme
) -> torch.Tensor:
    across, down = columns.lower, rows.lower
    exact = weight.double()[rows.order][:, columns.order]
    steps = expand_scales(scale, weight.shape[1]).double()[rows.order][:, columns.order]
    errors, codes = torch.zeros_like(exact), torch.zeros_like(exact)
    for i in reversed(range(len(exact))):
        for j in reversed(range(exact.shape[1])):
            rest = down[i:, i] @ errors[i:, j:] @ across[j:, j]
            code = ((exact[i, j] + rest / (down[i, i] * across[j, j])) / steps[i, j]).round()
            codes[i, j] = code.clamp(scheme.qmin, scheme.qmax)
            errors[i, j] = exact[i, j] - codes[i, j] * steps[i, j]
    restored = torch.empty_like(codes)
    restored[rows.order[:, None], columns.order] = codes
    return restored.to(torch.int8)


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 40),
    groups=st.integers(1, 5),
    block=st.sampled_from([4, 7, 16, 64]),
    seed=st.integers(0, 9),
    scheme=st.sampled_from([INT4, W8A8]),
)
def test_codes_are_those_of_one_entry_after_another(out: int, groups: int, block: int, seed: int, scheme: LinearScheme):
    weight, inputs, gradients = problem(out, 8 * groups, seed)
    columns, rows = factor_hessian(inputs.T @ inputs), factor_output_hessian(metric_of(gradients), CPU)
    scale = covering_scale(weight, scheme)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kronecker_rounding, "BLOCK", block)
        got = kronecker_round(weight, columns, rows, scale, scheme)
    wanted = one_at_a_time(weight, columns, rows, scale, scheme)
    # float32 against float64: a value that lies on a rounding edge may fall the other way, and others follow it
    assert (got != wanted).double().mean() <= 0.02


def test_the_answers_error_is_half_of_gptqs():
    weight, inputs, gradients = problem(96, 64)
    gram, metric = inputs.T @ inputs, metric_of(gradients)
    columns, scale = factor_hessian(gram), covering_scale(weight, INT4)

    def error(codes: torch.Tensor) -> float:
        wrong = weight - codes.float() * expand_scales(scale, 64)
        return float((gradients @ wrong @ inputs.T).square().sum())

    two = kronecker_round(weight, columns, factor_output_hessian(metric, CPU), scale, INT4)
    assert error(two) < 0.5 * error(gptq_round(weight, columns, scale, INT4))
    assert error(two) < 0.25 * error(round_to_codes(weight, scale, INT4))


def test_outputs_that_matter_alike_and_on_their_own_are_rounded_as_by_gptq():
    weight, inputs, _ = problem(24, 64)
    columns, scale = factor_hessian(inputs.T @ inputs), covering_scale(weight, INT4)
    for metric in (torch.eye(24), torch.zeros(24, 24)):
        got = kronecker_round(weight, columns, factor_output_hessian(metric, CPU), scale, INT4)
        assert (got != gptq_round(weight, columns, scale, INT4)).double().mean() < 0.01


def test_a_sketch_tells_directions_as_the_whole_does(monkeypatch: pytest.MonkeyPatch):
    weight, inputs, gradients = problem(96, 64)
    whole, columns, scale = metric_of(gradients), factor_hessian(inputs.T @ inputs), covering_scale(weight, INT4)
    monkeypatch.setattr(output_hessian, "SKETCH_ROWS", 48)
    sketch, generator = empty_output_hessian(96), torch.Generator().manual_seed(0)
    for part in gradients.split(50):
        sketch = add_gradients(sketch, part, generator)
    assert sketch.shape == (48, 96)
    assert float(sketch.float().square().sum() / whole.diagonal().sum()) == pytest.approx(1.0, abs=0.1)

    def error(codes: torch.Tensor) -> float:
        wrong = weight - codes.float() * expand_scales(scale, 64)
        return float((gradients @ wrong @ inputs.T).square().sum())

    rough = kronecker_round(weight, columns, factor_output_hessian(sketch, CPU), scale, INT4)
    assert error(rough) < 0.8 * error(gptq_round(weight, columns, scale, INT4))


@pytest.mark.parametrize("sketched", [2, 100])
def test_the_metric_of_folded_outputs(monkeypatch: pytest.MonkeyPatch, sketched: int):
    """What is divided by a factor has gradients that are as many times larger."""
    monkeypatch.setattr(output_hessian, "SKETCH_ROWS", sketched)
    gradients, factors = correlated(30, 6, 0), torch.tensor([0.5, 1.0, 2.0, 4.0, 0.25, 1.0])
    metrics = [
        add_gradients(empty_output_hessian(6), part, torch.Generator().manual_seed(0))
        for part in (gradients, gradients * factors)
    ]
    torch.testing.assert_close(scale_output_hessian(metrics[0], factors), metrics[1], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("sketched", [5, 100])
def test_what_an_error_of_each_output_counts(monkeypatch: pytest.MonkeyPatch, sketched: int) -> None:
    """Of all linears together; damped within each as rounding damps it."""
    monkeypatch.setattr(output_hessian, "SKETCH_ROWS", sketched)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(2000, 6, generator=generator) * size for size in (torch.arange(6.0), torch.tensor(0.1))]
    roots = root_output_importance([add_gradients(empty_output_hessian(6), part, generator) for part in gradients], CPU)
    sizes = [torch.arange(6.0).square(), torch.full((6,), 0.01)]
    wanted = torch.cat([size + DAMPING * size.mean() for size in sizes])
    torch.testing.assert_close(roots, (wanted / wanted.mean()).sqrt(), rtol=0.05 if sketched == 100 else 0.8, atol=0.0)
    assert float(roots.square().mean()) == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(root_output_importance([torch.zeros(3, 3)], CPU), torch.ones(3))  # nothing matters: all alike


def test_leverages_say_how_large_errors_are_at_a_token() -> None:
    """x^T H^-1 x; of a weight that GPTQ rounded, the squared error at a token is in proportion to it."""
    weight, inputs, _ = problem(512, 64)
    inputs[-5:] = inputs[-5:].flip(1)  # no larger than the others, and unlike them
    gram = inputs.T @ inputs
    found = leverage_scores(inputs, invert_cholesky(gram))
    rounder = factor_hessian(gram)
    damped = gram.double() + torch.eye(64) * float(
        rounder.lower.square().sum(1)[0] - gram.double()[rounder.order[0], rounder.order[0]]
    )
    wanted = torch.linalg.solve(damped, inputs.T.double()).T * inputs.double()
    torch.testing.assert_close(found.double(), wanted.sum(1), rtol=1e-3, atol=1e-6)
    scale = covering_scale(weight, INT4)
    codes = gptq_round(weight, rounder, scale, INT4)
    errors = ((codes.float() * expand_scales(scale, 64) - weight) @ inputs.T).square().sum(0)
    by_leverage, by_size = (
        float(torch.corrcoef(torch.stack([errors, estimate]))[0, 1]) for estimate in (found, inputs.square().sum(1))
    )
    assert by_leverage > 0.8
    assert by_size < 0.5
