"""Kronecker-factored rounding and output Hessians, against a reference that rounds one entry at a time, and against GPTQ."""

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
    """Rows [count, width] that lie mostly in a few directions."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + 0.2 * torch.eye(width)
    return torch.randn(count, width, generator=generator) @ (mix * 0.93 ** torch.arange(width)[:, None])


def problem(out: int, into: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight [out, in], inputs [tokens, in], gradients [tokens, out]."""
    weight = torch.randn(out, into, generator=torch.Generator().manual_seed(seed)) * 0.05
    return weight, correlated(3 * into, into, seed + 1), correlated(3 * out, out, seed + 2)


def output_hessian_of(gradients: torch.Tensor) -> torch.Tensor:
    """G [out, out] of gradients [tokens, out]."""
    return add_gradients(empty_output_hessian(gradients.shape[1]), gradients, torch.Generator())


def round_one_at_a_time(
    weight: torch.Tensor, columns: HessianFactor, rows: HessianFactor, scale: torch.Tensor, scheme: LinearScheme
) -> torch.Tensor:
    """Codes int8 [out, in] that minimize |M^T E L|^2 in float64, with one entry after another: slabs of a single output."""
    l_factor, m_factor = columns.lower, rows.lower
    exact = weight.double()[rows.order][:, columns.order]
    steps = expand_scales(scale, weight.shape[1]).double()[rows.order][:, columns.order]
    errors, codes = torch.zeros_like(exact), torch.zeros_like(exact)
    for i in reversed(range(len(exact))):
        for j in reversed(range(exact.shape[1])):
            propagated = m_factor[i:, i] @ errors[i:, j:] @ l_factor[j:, j]
            code = ((exact[i, j] + propagated / (m_factor[i, i] * l_factor[j, j])) / steps[i, j]).round()
            codes[i, j] = code.clamp(scheme.qmin, scheme.qmax)
            errors[i, j] = exact[i, j] - codes[i, j] * steps[i, j]
    restored = torch.empty_like(codes)
    restored[rows.order[:, None], columns.order] = codes
    return restored.to(torch.int8)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    groups=st.integers(1, 5),
    seed=st.integers(0, 9),
    scheme=st.sampled_from([INT4, W8A8]),
)
def test_slabs_of_one_output_are_rounded_as_one_entry_at_a_time(
    sizes: list[int], groups: int, seed: int, scheme: LinearScheme
) -> None:
    """Also where several linears share the input: each is rounded as if it were alone."""
    weight, inputs, _ = problem(sum(sizes), 8 * groups, seed)
    columns, scale = factor_hessian(inputs.T @ inputs), covering_scale(weight, scheme)
    gradients = [correlated(3 * size, size, seed + 2) for size in sizes]
    factors = [factor_output_hessian(output_hessian_of(gradient), CPU) for gradient in gradients]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kronecker_rounding, "SLABS", 20)
        codes, kept = kronecker_round(weight, columns, factors, scale, scheme)
    assert torch.equal(kept, scale)
    parts = zip(weight.split(sizes), factors, scale.split(sizes), strict=True)
    expected = torch.cat([round_one_at_a_time(part, columns, rows, step, scheme) for part, rows, step in parts])
    # float32 against float64: a value that lies on a rounding edge may fall the other way, and others follow it
    assert (codes != expected).double().mean() <= 0.02


@settings(max_examples=25, deadline=None)
@given(out=st.integers(1, 50), slabs=st.integers(1, 20), seed=st.integers(0, 9))
def test_every_slab_is_moved_by_what_the_slabs_before_it_left(out: int, slabs: int, seed: int) -> None:
    """The move minimizes |M^T E| over the slab's rows and those that are rounded after it: found here by least squares."""
    weight, inputs, gradients = problem(out, 16, seed)
    columns, rows = factor_hessian(inputs.T @ inputs), factor_output_hessian(output_hessian_of(gradients), CPU)
    scale, m = covering_scale(weight, INT4), rows.lower
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kronecker_rounding, "SLABS", slabs)
        codes = kronecker_round(weight, columns, [rows], scale, INT4)[0][rows.order]
    exact, steps = weight[rows.order], scale[rows.order]
    errors = exact.double() - codes.double() * expand_scales(steps, 16)
    for slab in range(slabs):
        start, stop = slab * out // slabs, (slab + 1) * out // slabs
        if start < stop:
            best = torch.linalg.lstsq(m[:stop].T, -m[stop:].T @ errors[stop:]).solution
            moved = exact[start:stop] - best[start:].float()
            expected = gptq_round(moved, columns, steps[start:stop], INT4)
            assert (codes[start:stop] != expected).double().mean() <= 0.05


def test_error_of_the_model_output_is_below_half_of_gptqs():
    weight, inputs, gradients = problem(96, 64)
    hessian, fisher = inputs.T @ inputs, output_hessian_of(gradients)
    columns, scale = factor_hessian(hessian), covering_scale(weight, INT4)

    def error(codes: torch.Tensor) -> float:
        error_matrix = weight - codes.float() * expand_scales(scale, 64)
        return float((gradients @ error_matrix @ inputs.T).square().sum())

    kronecker, _ = kronecker_round(weight, columns, [factor_output_hessian(fisher, CPU)], scale, INT4)
    assert error(kronecker) < 0.5 * error(gptq_round(weight, columns, scale, INT4))
    assert error(kronecker) < 0.25 * error(round_to_codes(weight, scale, INT4))


def test_an_output_hessian_of_identity_or_zero_rounds_as_gptq():
    weight, inputs, _ = problem(24, 64)
    columns, scale = factor_hessian(inputs.T @ inputs), covering_scale(weight, INT4)
    for fisher in (torch.eye(24), torch.zeros(24, 24)):
        codes, _ = kronecker_round(weight, columns, [factor_output_hessian(fisher, CPU)], scale, INT4)
        assert (codes != gptq_round(weight, columns, scale, INT4)).double().mean() < 0.01


def test_rounding_by_a_sketched_output_hessian_beats_gptq(monkeypatch: pytest.MonkeyPatch):
    weight, inputs, gradients = problem(96, 64)
    whole, columns, scale = output_hessian_of(gradients), factor_hessian(inputs.T @ inputs), covering_scale(weight, INT4)
    monkeypatch.setattr(output_hessian, "SKETCH_ROWS", 48)
    sketch, generator = empty_output_hessian(96), torch.Generator().manual_seed(0)
    for part in gradients.split(50):
        sketch = add_gradients(sketch, part, generator)
    assert sketch.shape == (48, 96)
    assert float(sketch.float().square().sum() / whole.diagonal().sum()) == pytest.approx(1.0, abs=0.1)

    def error(codes: torch.Tensor) -> float:
        error_matrix = weight - codes.float() * expand_scales(scale, 64)
        return float((gradients @ error_matrix @ inputs.T).square().sum())

    codes, _ = kronecker_round(weight, columns, [factor_output_hessian(sketch, CPU)], scale, INT4)
    assert error(codes) < 0.8 * error(gptq_round(weight, columns, scale, INT4))


@pytest.mark.parametrize("sketch_rows", [2, 100])
def test_output_hessians_of_equalized_outputs_are_scaled_by_their_factors(monkeypatch: pytest.MonkeyPatch, sketch_rows: int):
    """Dividing an output by a factor multiplies its gradients by it."""
    monkeypatch.setattr(output_hessian, "SKETCH_ROWS", sketch_rows)
    gradients, factors = correlated(30, 6, 0), torch.tensor([0.5, 1.0, 2.0, 4.0, 0.25, 1.0])
    output_hessians = [
        add_gradients(empty_output_hessian(6), part, torch.Generator().manual_seed(0))
        for part in (gradients, gradients * factors)
    ]
    torch.testing.assert_close(scale_output_hessian(output_hessians[0], factors), output_hessians[1], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("sketch_rows", [5, 100])
def test_output_importance_is_the_damped_diagonal_of_the_output_hessians(
    monkeypatch: pytest.MonkeyPatch, sketch_rows: int
) -> None:
    """It is normalized over all linears together, and damped within each linear as rounding damps it."""
    monkeypatch.setattr(output_hessian, "SKETCH_ROWS", sketch_rows)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(2000, 6, generator=generator) * size for size in (torch.arange(6.0), torch.tensor(0.1))]
    roots = root_output_importance([add_gradients(empty_output_hessian(6), part, generator) for part in gradients], CPU)
    diagonals = [torch.arange(6.0).square(), torch.full((6,), 0.01)]
    expected = torch.cat([size + DAMPING * size.mean() for size in diagonals])
    torch.testing.assert_close(
        roots, (expected / expected.mean()).sqrt(), rtol=0.05 if sketch_rows == 100 else 0.8, atol=0.0
    )
    assert float(roots.square().mean()) == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(root_output_importance([torch.zeros(3, 3)], CPU), torch.ones(3))  # no gradients: equal importance


def test_leverages_predict_the_rounding_error_at_a_token() -> None:
    """Leverages are x^T H^-1 x; the squared output error of GPTQ at a token is proportional to them."""
    weight, inputs, _ = problem(512, 64)
    inputs[-5:] = inputs[-5:].flip(1)  # no larger than the other inputs, and unlike them
    hessian = inputs.T @ inputs
    leverages = leverage_scores(inputs, invert_cholesky(hessian))
    factor = factor_hessian(hessian)
    damped = hessian.double() + torch.eye(64) * float(
        factor.lower.square().sum(1)[0] - hessian.double()[factor.order[0], factor.order[0]]
    )
    expected = torch.linalg.solve(damped, inputs.T.double()).T * inputs.double()
    torch.testing.assert_close(leverages.double(), expected.sum(1), rtol=1e-3, atol=1e-6)
    scale = covering_scale(weight, INT4)
    codes = gptq_round(weight, factor, scale, INT4)
    errors = ((codes.float() * expand_scales(scale, 64) - weight) @ inputs.T).square().sum(0)
    by_leverage, by_size = (
        float(torch.corrcoef(torch.stack([errors, estimate]))[0, 1]) for estimate in (leverages, inputs.square().sum(1))
    )
    assert by_leverage > 0.8
    assert by_size < 0.5


def test_scales_fitted_slab_by_slab_leave_less_error_of_the_model_output():
    weight, inputs, gradients = problem(96, 64)
    hessian = inputs.T @ inputs
    factor, columns = factor_output_hessian(output_hessian_of(gradients), CPU), factor_hessian(hessian)
    errors = []
    for fitted in (None, hessian):
        codes, scale = kronecker_round(weight, columns, [factor], covering_scale(weight, INT4), INT4, hessian=fitted)
        error_matrix = weight - codes.float() * expand_scales(scale, 64)
        errors.append(float((gradients @ error_matrix @ inputs.T).square().sum()))
    assert scale.dtype == torch.float16
    assert errors[1] < 0.97 * errors[0]
