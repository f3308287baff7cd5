"""Range searches against slow loops over the same candidates."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.quantization.quantizer import activation_scale, group_amax, round_to_codes, weight_scale
from qvlm_export.calibrate.rounding.range_search import (
    ACTIVATION_FRACTIONS,
    WEIGHT_FRACTIONS,
    fake_quantize,
    search_activation_scale,
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
