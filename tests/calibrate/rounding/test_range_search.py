"""Range searches against slow loops over the same candidates."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.quantization.hessian import factor_hessian
from qvlm_export.calibrate.quantization.quantizer import (
    activation_scale,
    covering_scale,
    expand_scales,
    group_amax,
    round_to_codes,
    stored_weight_scale,
    weight_scale,
)
from qvlm_export.calibrate.rounding.gptq import gptq_round
from qvlm_export.calibrate.rounding.range_search import (
    ACTIVATION_FRACTIONS,
    RESIDUAL_FRACTIONS,
    WEIGHT_FRACTIONS,
    fake_quantize,
    search_activation_scale,
    search_residual_scale,
    search_weight_scale,
)

INT4 = LinearScheme(weight_bits=4, activation_bits=None, group_size=64)


def tensors(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [4, 128] with an outlier, and inputs [300, 128]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 128, generator=generator) * 0.05
    weight[0, 3] = 1.0  # an outlier that is worth clipping
    return weight, torch.randn(300, 128, generator=generator)


def test_int4_scales_minimize_the_output_error_of_each_group():
    weight, inputs = tensors(0)
    hessian = inputs.T @ inputs
    result = search_weight_scale(weight, hessian, INT4)
    amax = group_amax(weight, INT4)
    for row in range(4):
        for group in range(2):
            columns = slice(64 * group, 64 * group + 64)
            costs = []
            for fraction in WEIGHT_FRACTIONS:
                scale = weight_scale(amax * fraction, INT4)[row, group]
                codes = np.clip(np.round((weight[row, columns] / scale.float()).numpy()), -8, 7)
                error = weight[row, columns].numpy() - codes * float(scale)
                costs.append((float(error @ hessian[columns, columns].numpy() @ error), float(scale)))
            assert float(result[row, group]) == min(costs)[1]
    assert float(result[0, 0]) < float(weight_scale(amax, INT4)[0, 0])


def test_int8_scales_have_at_most_the_error_of_absmax_scales():
    weight, inputs = tensors(1)
    hessian = inputs.T @ inputs

    def cost(scale: torch.Tensor) -> torch.Tensor:
        error = weight - round_to_codes(weight, scale, W8A8).float() * scale[:, None]
        return (error.square() * hessian.diagonal()).sum(1)

    assert (cost(search_weight_scale(weight, hessian, W8A8)) <= cost(weight_scale(group_amax(weight, W8A8), W8A8))).all()


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), groups=st.integers(1, 3), bits=st.sampled_from([3, 4]), seed=st.integers(0, 9))
def test_residual_scales_have_the_least_error_by_residual_energy(rows: int, groups: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, inputs = (torch.randn(n, 64 * groups, generator=generator) for n in (rows, 300))
    scheme, factor = LinearScheme(bits, None, 64), factor_hessian(inputs.T @ inputs)
    found, whole = search_residual_scale(weight, factor, scheme), covering_scale(weight, scheme)
    assert found.dtype == torch.float16
    energy = factor.residual_energy()
    for row in range(rows):
        for group in range(groups):
            part, costs = slice(64 * group, 64 * group + 64), []
            for fraction in RESIDUAL_FRACTIONS:
                scale = stored_weight_scale(whole.float() * fraction, scheme)[row, group]
                codes = (weight[row, part] / scale.float()).round().clamp(scheme.qmin, scheme.qmax)
                error = weight[row, part] - codes * scale.float()
                costs.append((float((error.square() * energy[part]).sum()), float(scale)))
            chosen = next(cost for cost, scale in costs if scale == float(found[row, group]))
            assert chosen <= min(costs)[0] * (1 + 1e-5)


def test_residual_scales_leave_less_error_after_gptq_than_covering_ones() -> None:
    weight, inputs = tensors(3)
    hessian = inputs.T @ inputs
    factor = factor_hessian(hessian)

    def error(scale: torch.Tensor) -> float:
        codes = gptq_round(weight, factor, scale, INT4)
        return float(((weight - codes.float() * expand_scales(scale, 128)) @ inputs.T).square().sum())

    assert error(search_residual_scale(weight, factor, INT4)) < 0.95 * error(covering_scale(weight, INT4))


def test_residual_scales_of_whole_rows_cover_them() -> None:
    weight, inputs = tensors(4)
    assert torch.equal(search_residual_scale(weight, factor_hessian(inputs.T @ inputs), W8A8), covering_scale(weight, W8A8))


def test_the_activation_scale_is_the_candidate_with_the_least_output_error():
    weight, inputs = tensors(2)
    inputs[0, 0] = 40.0
    float_inputs = inputs + 0.01
    amax = float(inputs.abs().max())
    costs = []
    for fraction in ACTIVATION_FRACTIONS:
        scale = activation_scale(amax * fraction, 8)
        error = fake_quantize(inputs, scale, 8) - float_inputs
        costs.append((float((error @ weight.T).square().sum()), scale))
    assert search_activation_scale(inputs, float_inputs, weight, 8) == min(costs)[1]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=20), st.floats(0.01, 2.0))
def test_fake_quantization_is_quantize_then_dequantize(values, scale):
    x = np.array(values, np.float32)
    codes = np.clip(np.rint((torch.tensor(x) / scale).numpy()), -128, 127)
    result = fake_quantize(torch.tensor(x), scale, 8)
    np.testing.assert_allclose(result.numpy(), codes * np.float32(scale), rtol=1e-6)
