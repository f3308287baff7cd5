"""The expected-error model, against errors that quantization really makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.quantization.expected_error import (
    TAIL_VALUES,
    ErrorModel,
    OutlierTail,
    _find_largest,
    choose_expected_scale,
    compute_residual_energy,
    fit_tail,
    optimize_factors,
    subsample_rows,
)
from qvlm_export.calibrate.quantization.quantizer import (
    expand_scales,
    fake_quantize,
    group_amax,
    round_to_codes,
    weight_scale,
)

W4A16 = LinearScheme(4, None, 64)
W8A8 = LinearScheme(8, 8, None)
W4A4 = LinearScheme(4, 4, 64)


def layer(seed: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [2048, 128] of channels whose sizes differ, and a weight [96, 128]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (spread * torch.randn(128, generator=generator)).exp()
    mixing = torch.randn(128, 128, generator=generator) / 12 + torch.eye(128)
    return torch.randn(2048, 128, generator=generator) @ mixing * sizes, torch.randn(96, 128, generator=generator)


def error_model_of(x: torch.Tensor, weight: torch.Tensor, scheme: LinearScheme) -> ErrorModel:
    return ErrorModel(fit_tail(x), x.square().mean(0), weight, scheme)


def measure_error(
    x: torch.Tensor, weight: torch.Tensor, scheme: LinearScheme, factors: torch.Tensor, limit: float | None
) -> float:
    """Mean squared error of a token's y = W x after round-to-nearest. limit: range of the equalized inputs."""
    equalized, scaled = x / factors, weight * factors
    if scheme.activation_bits is not None and limit is not None:
        rounded = fake_quantize(equalized, limit / (2 ** (scheme.activation_bits - 1) - 1), scheme.activation_bits)
    else:
        rounded = equalized
    scale = weight_scale(group_amax(scaled, scheme), scheme)
    codes = round_to_codes(scaled, scale, scheme)
    errors = rounded @ (codes.float() * expand_scales(scale, 128)).T - x @ weight.T
    return float(errors.square().sum() / len(x))


@pytest.mark.parametrize("scheme", [W4A16, W8A8], ids=["W4A16", "W8A8"])
def test_expected_errors_equal_measured_errors(scheme: LinearScheme) -> None:
    """Only rounding is compared: the range covers all inputs, and the expected clipping error is subtracted."""
    x, weight = layer(0)
    factors = x.abs().amax(0).sqrt()
    limit = float((x / factors).abs().max())
    model = error_model_of(x, weight, scheme)
    clipped = float((weight.square().sum(0) * model.tail.clipping_error(factors * limit)[0]).sum())
    expected = float(model.expected_error(factors * limit)) - 10.0 * clipped * (scheme.activation_bits is not None)
    assert expected == pytest.approx(measure_error(x, weight, scheme, factors, limit), rel=0.25)


@pytest.mark.parametrize("scheme", [W4A16, W8A8, W4A4], ids=["W4A16", "W8A8", "W4A4"])
def test_optimized_factors_make_smaller_errors_than_smoothquant_factors(scheme: LinearScheme) -> None:
    x, weight = layer(1)
    model = error_model_of(x, weight, scheme)
    starts = [x.abs().amax(0) ** e / weight.abs().amax(0) ** (1 - e) for e in (0.5, 1.0)]
    optimized = optimize_factors(model, starts, torch.arange(128))
    errors = []
    for factors in (*starts, optimized):
        bits = scheme.activation_bits
        scale = (
            None if bits is None else choose_expected_scale(fit_tail(x / factors), (weight * factors).square().sum(0), bits)
        )
        limit = None if scale is None or bits is None else scale * (2 ** (bits - 1) - 1)
        errors.append(measure_error(x, weight, scheme, factors, limit))
    assert errors[-1] < 0.9 * min(errors[:-1])


def test_a_common_factor_does_not_matter_where_activations_stay_float() -> None:
    x, weight = layer(2)
    model, factors = error_model_of(x, weight, W4A16), torch.rand(128) + 0.5
    assert float(model.expected_error(8 * factors)) == pytest.approx(float(model.expected_error(factors)), rel=1e-5)


@pytest.mark.parametrize("scheme", [W4A16, W8A8, W4A4], ids=["W4A16", "W8A8", "W4A4"])
def test_the_gradient_equals_that_of_autograd(scheme: LinearScheme) -> None:
    x, weight = layer(4)
    model = error_model_of(x, weight, scheme)
    logs = (x.abs().amax(0) * (0.5 + torch.rand(128, generator=torch.Generator().manual_seed(0)))).log().requires_grad_()
    expected = model.expected_error(logs.exp())
    expected.backward()
    error, gradient = model.error_and_gradient(logs.detach().exp())
    assert error == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, logs.grad, rtol=1e-4, atol=1e-5 * error)


def test_inputs_that_share_a_factor_get_one_factor() -> None:
    x, weight = layer(3)
    expand = torch.arange(64).repeat(2)
    factors = optimize_factors(error_model_of(x, weight, W8A8), [torch.ones(64)], expand)
    assert factors.shape == (64,)
    assert float(factors.std()) > 0


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), parts=st.lists(st.floats(0.05, 4.0), min_size=2, max_size=2))
def test_expected_clipping_is_at_least_the_observed_and_falls_with_the_limit(seed: int, parts: list[float]) -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(seed))
    tail = fit_tail(x)
    small, large = (torch.full((3,), part) for part in sorted(parts))
    observed = x.abs().topk(TAIL_VALUES, dim=0).values
    assert (tail.clipping_error(small)[0] >= (observed - small).clamp(min=0).square().sum(0) / 200 * 0.999).all()
    assert (tail.clipping_error(large)[0] <= tail.clipping_error(small)[0] * 1.001).all()
    assert (tail.clipping_error(torch.full((3,), 100.0))[0] < 1e-6).all()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.floats(0, 4, width=32)),
    st.integers(1, 40),
    st.sampled_from([1, 45]),
)
def test_the_largest_values_are_those_of_topk(size: np.ndarray, count: int, times: int) -> None:
    """That holds for equal values, too, and for so many tokens that groups of them are passed over."""
    repeated = torch.from_numpy(size).repeat(times, 1)
    repeated += 0.1 * torch.arange(len(repeated))[:, None].remainder(7)
    count = min(count, len(repeated))
    largest = _find_largest(repeated, count)
    assert largest.is_contiguous()  # sums over it depend on that in their last bits
    torch.testing.assert_close(largest, repeated.topk(count, dim=0).values, rtol=0, atol=0)


def test_finding_the_largest_values_does_not_sort_the_argument() -> None:
    """With one channel or one token the transposed tensor is contiguous, so that nothing is copied unless it has to be."""
    for shape in ((2000, 1), (1, 50), (2000, 3)):
        size = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        before = size.clone()
        _find_largest(size, 1)
        assert torch.equal(size, before)


def test_longer_tails_get_larger_ranges() -> None:
    generator = torch.Generator().manual_seed(0)
    even = torch.rand(4096, 1, generator=generator)
    heavy = -torch.rand(4096, 1, generator=generator).log()
    ratios = [choose_expected_scale(fit_tail(x), torch.ones(1), 8) * 127 / float(x.max()) for x in (even, heavy)]
    assert ratios[0] < 1.5
    assert ratios[1] > ratios[0]


def test_fewer_bits_clip_more() -> None:
    x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    limits = [choose_expected_scale(fit_tail(x), torch.ones(16), bits) * (2 ** (bits - 1) - 1) for bits in (4, 6, 8)]
    assert limits[0] < limits[1] <= limits[2]


def test_few_tokens_and_channels_of_zeros_give_finite_factors() -> None:
    for tokens in (1, 3, 5):
        x = torch.zeros(tokens, 64)
        x[:, 0] = 1.0
        model = ErrorModel(fit_tail(x), torch.ones(64), torch.ones(2, 64), W8A8)
        factors = optimize_factors(model, [torch.ones(64)], torch.arange(64))
        assert torch.isfinite(factors).all()
        assert choose_expected_scale(fit_tail(x), torch.ones(64), 8) > 0


def test_subsampled_rows_include_the_first_and_the_last() -> None:
    weight = torch.arange(1000.0)[:, None]
    assert subsample_rows(weight).shape == (512, 1)
    assert subsample_rows(weight)[-1] == 999.0
    assert len(subsample_rows(weight[:10])) == 10


def test_clipping_error_of_a_known_tail() -> None:
    tail = OutlierTail(torch.tensor([[4.0], [2.0]]), torch.tensor([1.0]), 10)
    inside, beyond = 1.0 + 2.0 * 1.0 + 2.0, 2.0 * torch.tensor(-1.0).exp()
    assert float(tail.clipping_error(torch.tensor([3.0]))[0]) == pytest.approx(float(inside + beyond) / 10)


def test_residual_energies_of_independent_channels_are_their_mean_squares() -> None:
    x = torch.randn(20000, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2.0, 16)
    assert compute_residual_energy(x, None).numpy() == pytest.approx(x.square().mean(0).numpy(), rel=0.12)
    x[:, 1] = 3 * x[:, 0]  # each predicts the other, up to damping
    energy = compute_residual_energy(x, torch.full((len(x),), 2.0))
    assert float(energy[:2].prod() / x.square().mean(0)[:2].prod()) < 0.5  # 2 * 2 if they were independent
    assert energy[2:].numpy() == pytest.approx(2 * x.square().mean(0)[2:].numpy(), rel=0.12)
