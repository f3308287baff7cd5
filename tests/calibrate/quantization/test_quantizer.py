"""Scales and codes: their bounds, and against an independent slow quantizer and ONNX's own dequantization."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.quantization.quantizer import (
    activation_scale,
    covering_scale,
    expand_scales,
    fake_quantize,
    group_amax,
    quantize_linear,
    round_to_codes,
    weight_scale,
)

W4A16 = LinearScheme(weight_bits=4, activation_bits=None, group_size=64)
W3A8, W6A6 = LinearScheme(3, 8, 64), LinearScheme(6, 6, None)
SCHEMES = pytest.mark.parametrize("scheme", [W4A16, W8A8, W3A8, W6A6], ids=lambda s: s.name)
HIGHEST = {3: 3, 4: 7, 6: 31, 8: 127}  # code by bits
AMAX = st.floats(0, 65504, width=32)
# Very different magnitudes, so that small groups lie beside large ones; all are in the range of float16.
MAGNITUDES = st.sampled_from([0.0, 1e-7, 1e-4, 0.02, 1.0, 300.0, 65000.0])


@st.composite
def weights(draw):
    """A weight, float32 [out, 128], of which every group of 64 has a magnitude of its own."""
    rows = draw(st.integers(1, 4))
    unit = draw(arrays(np.float32, (rows, 2, 64), elements=st.floats(-1, 1, width=32), fill=st.just(0.25)))
    size = np.array(draw(st.lists(MAGNITUDES, min_size=2 * rows, max_size=2 * rows)), np.float32)
    return (unit * size.reshape(rows, 2, 1)).reshape(rows, 128)


def slow_quantize(weight, scheme):
    """Codes and scales, computed one value at a time."""
    rows, columns = weight.shape
    width = scheme.group_size or columns
    codes, scales = np.zeros((rows, columns), int), np.zeros((rows, columns // width))
    for row in range(rows):
        for group in range(columns // width):
            values = [np.float32(v) for v in weight[row, group * width : (group + 1) * width]]
            scale = max(abs(v) for v in values) / np.float32(HIGHEST[scheme.weight_bits])
            if scheme.group_size:
                scale = np.float32(np.float16(max(scale, np.float32(2**-14))))
            else:
                scale = max(scale, np.float32(2**-30))
            scales[row, group] = scale
            for i, value in enumerate(values):
                code = round(float(value / scale))  # Python rounds ties to even
                codes[row, group * width + i] = min(max(code, scheme.qmin), scheme.qmax)
    return codes, scales if scheme.group_size else scales[:, 0]


def expand_scale(linear):
    """The scale of every single weight, float32 [out, in]."""
    scale = linear.scale.astype(np.float32)
    if linear.scheme.group_size is None:
        return np.broadcast_to(scale[:, None], linear.codes.shape)
    return np.repeat(scale, linear.scheme.group_size, axis=1)


@SCHEMES
@settings(deadline=None, max_examples=60)
@given(weight=weights())
def test_codes_and_scales_equal_those_of_the_slow_quantizer(scheme, weight):
    linear = quantize_linear(torch.from_numpy(weight), scheme, 1.0)
    codes, scales = slow_quantize(weight, scheme)
    assert linear.codes.dtype == np.int8
    np.testing.assert_array_equal(linear.codes, codes)
    np.testing.assert_array_equal(linear.scale.astype(np.float64), scales)


@SCHEMES
@settings(deadline=None, max_examples=100)
@given(weight=weights())
def test_codes_are_in_range_and_errors_at_most_half_a_step(scheme, weight):
    linear = quantize_linear(torch.from_numpy(weight), scheme, 1.0)
    assert linear.codes.min() >= scheme.qmin
    assert linear.codes.max() <= scheme.qmax
    assert linear.scale.shape == scheme.scale_shape(weight.shape)
    error = np.abs(weight.astype(np.float64) - linear.dequantized())
    assert (error <= expand_scale(linear) * (0.5 + 1e-5)).all()


@SCHEMES
@settings(deadline=None, max_examples=100)
@given(weight=weights())
def test_scales_have_the_stored_type_and_are_never_zero(scheme, weight):
    linear = quantize_linear(torch.from_numpy(weight), scheme, 1.0)
    assert linear.scale.dtype == (np.float16 if scheme.group_size else np.float32)
    assert np.isfinite(linear.scale).all()
    assert (linear.scale >= (2**-14 if scheme.group_size else 2**-30)).all()


@SCHEMES
@settings(max_examples=60, deadline=None, derandomize=True)
@given(weight=weights())
def test_a_covering_scale_clips_nothing_and_is_at_most_the_absmax_scale(scheme, weight):
    tensor = torch.from_numpy(weight)
    scale = covering_scale(tensor, scheme)
    assert scale.dtype == (torch.float32 if scheme.group_size is None else torch.float16)
    assert (scale <= weight_scale(group_amax(tensor, scheme), scheme)).all()
    steps = expand_scales(scale, weight.shape[1])
    codes = round_to_codes(tensor, scale, scheme).float()
    assert ((tensor - codes * steps).abs() <= steps * (0.5 + 0.01)).all()  # float16 scales may be rounded down a little


@SCHEMES
def test_a_group_of_zeros_becomes_codes_of_zero(scheme):
    weight = torch.zeros(2, 128)
    weight[1, 64:] = 3.0
    linear = quantize_linear(weight, scheme, 1.0)
    np.testing.assert_array_equal(linear.codes[0], 0)
    np.testing.assert_array_equal(linear.dequantized()[1, :64], 0)
    np.testing.assert_allclose(linear.dequantized()[1, 64:], 3.0, rtol=2**-11)


@SCHEMES
def test_the_weight_itself_is_not_changed(scheme):
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    quantize_linear(weight, scheme, 1.0)
    assert torch.equal(weight, before)


def test_a_tie_is_rounded_to_the_even_code():
    weight = torch.zeros(1, 128)
    weight[0, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])  # the scale is 1
    assert quantize_linear(weight, W8A8, 1.0).codes[0, :4].tolist() == [127, 0, 2, -2]


@settings(deadline=None, max_examples=100)
@given(AMAX, st.sampled_from([4, 6, 8]))
def test_an_activation_scale_is_the_smallest_float16_that_does_not_clip(amax, bits):
    scale = activation_scale(amax, bits)
    exact = max(amax / HIGHEST[bits], 2.0**-14)
    assert float(np.float16(scale)) == scale
    assert scale >= exact
    assert float(np.nextafter(np.float16(scale), np.float16(0))) < exact


def test_an_input_that_is_always_zero_has_a_scale_above_zero():
    assert quantize_linear(torch.ones(2, 128), W8A8, 0.0).input_scale == 2.0**-14


def test_only_quantized_activations_have_a_scale():
    assert quantize_linear(torch.ones(2, 128), W4A16, 5.0).input_scale is None
    for scheme in (W8A8, W3A8, W6A6):
        scale = quantize_linear(torch.ones(2, 128), scheme, 5.0).input_scale
        assert scale == activation_scale(5.0, scheme.activation_bits)


@settings(deadline=None, max_examples=100)
@given(
    arrays(np.float32, st.integers(1, 20), elements=st.floats(-1000, 1000, width=32)),
    st.floats(2.0**-14, 100, width=16),
    st.sampled_from([4, 6, 8]),
)
def test_fake_quantization_rounds_saturates_and_multiplies(values, scale, bits):
    quantized = fake_quantize(torch.from_numpy(values), scale, bits)
    for value, actual in zip(values, quantized.tolist(), strict=True):
        code = round(float(np.float32(value) / np.float32(scale)))  # Python rounds ties to even
        assert actual == np.float32(min(max(code, -HIGHEST[bits] - 1), HIGHEST[bits])) * np.float32(scale)


def dequantize_by_onnx(linear):
    """The weights [out, in] as ONNX's reference evaluator computes them from the transposed codes of the graph."""
    codes, scale = np.ascontiguousarray(linear.codes.T), linear.scale.T.astype(np.float32)
    if linear.scheme.group_size:
        stored = helper.make_tensor("codes", TensorProto.INT4, codes.shape, codes.reshape(-1).tolist())
        node = helper.make_node("DequantizeLinear", ["codes", "scale"], ["y"], axis=0, block_size=linear.scheme.group_size)
    else:
        stored = numpy_helper.from_array(codes, "codes")
        node = helper.make_node("DequantizeLinear", ["codes", "scale"], ["y"], axis=1)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, codes.shape)
    scales = numpy_helper.from_array(np.ascontiguousarray(scale), "scale")
    graph = helper.make_graph([node], "dequantize", [], [output], [stored, scales])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=12)
    onnx.checker.check_model(model, full_check=True)
    return ReferenceEvaluator(model).run(None, {})[0].T


@SCHEMES
@settings(deadline=None, max_examples=30)
@given(weight=weights())
def test_onnx_dequantizes_to_the_same_weights(scheme, weight):
    linear = quantize_linear(torch.from_numpy(weight), scheme, 1.0)
    np.testing.assert_array_equal(dequantize_by_onnx(linear), linear.dequantized())
