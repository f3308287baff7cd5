"""Quantization schemes: refused bits and shapes with their messages, code ranges, scale shapes and group sizes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme, SchemeError, fit_scheme, parse_scheme_bits
from qvlm_export.calibrate.errors import UserError

W4A16 = (4, None)
BITS = {f"W{w}A{a}": (w, None if a == 16 else a) for w in (3, 4, 6, 8) for a in (4, 6, 8, 16)}


@pytest.mark.parametrize(("weight", "activation"), [(2, None), (5, 8), (16, 16), (0, None), (8, 16), (8, 5)])
def test_unsupported_bits_are_refused_with_the_name(weight, activation):
    with pytest.raises(SchemeError, match=rf"^W{weight}A\d+: weights have 3, 4, 6 or 8 bits, activations 4, 6, 8 or 16$"):
        LinearScheme(weight_bits=weight, activation_bits=activation, group_size=None)


@pytest.mark.parametrize(("weight", "activation", "group"), [(4, None, None), (3, 4, None), (8, 8, 128), (6, 6, 64)])
def test_a_group_size_is_required_for_3_and_4_bits_and_refused_for_others(weight, activation, group):
    with pytest.raises(SchemeError, match=r"^W\dA\d+: group_size belongs to 3-bit and 4-bit weights and to them only$"):
        LinearScheme(weight_bits=weight, activation_bits=activation, group_size=group)


def test_a_scheme_error_is_a_user_error():
    assert issubclass(SchemeError, UserError)


@pytest.mark.parametrize(("name", "bits"), BITS.items())
def test_a_scheme_name_is_parsed_into_its_bits_and_back(name, bits):
    assert parse_scheme_bits(name) == bits
    assert fit_scheme("some.linear", (8, 128), *bits).name == name


@pytest.mark.parametrize("name", ["W5A8", "W4A2", "W16A16", "W4A", "A8", "w4a8", "W4A8 ", "W04A8", "", "W4A99999", "float"])
def test_an_invalid_scheme_name_is_refused_with_the_supported_bits(name):
    with pytest.raises(
        SchemeError, match=f"^{name}: weights have 3, 4, 6 or 8 bits, activations 4, 6, 8 or 16; write W4A16"
    ):
        parse_scheme_bits(name)


def test_what_tensorrt_has_kernels_for():
    deployable = {name for name, bits in BITS.items() if fit_scheme("some.linear", (8, 128), *bits).deployable}
    assert deployable == {"W4A16", "W8A8", "W8A16"}


@pytest.mark.parametrize(("bits", "lowest", "highest"), [(3, -4, 3), (4, -8, 7), (6, -31, 31), (8, -127, 127)])
def test_code_ranges(bits, lowest, highest):
    scheme = fit_scheme("some.linear", (8, 128), bits, None)
    assert (scheme.qmin, scheme.qmax) == (lowest, highest)


def test_scale_shapes():
    assert LinearScheme(4, None, 64).scale_shape((6, 256)) == (6, 4)
    assert LinearScheme(3, 8, 128).scale_shape((6, 256)) == (6, 2)
    assert W8A8.scale_shape((6, 256)) == (6,)


@pytest.mark.parametrize(
    ("inputs", "group"), [(128, 128), (64, 64), (192, 64), (4096, 128), (13824, 128), (11008, 128), (320, 64)]
)
def test_the_largest_group_size_that_divides_the_inputs_is_chosen(inputs, group):
    for bits in (3, 4):
        assert fit_scheme("some.linear", (8, inputs), bits, 8) == LinearScheme(bits, 8, group_size=group)


def test_6_and_8_bits_fit_any_shape():
    assert fit_scheme("some.linear", (7, 99), 6, 6) == LinearScheme(6, 6, None)
    assert fit_scheme("some.linear", (7, 99), 8, 8) == W8A8


def test_only_the_requested_group_sizes_are_used():
    assert fit_scheme("some.linear", (8, 256), *W4A16, (64,)).group_size == 64


@pytest.mark.parametrize(
    ("shape", "sizes", "words"),
    [
        ((8, 96), (128, 64), "128 nor 64 does not divide its 96 inputs"),
        ((8, 192), (128,), "128 does not divide its 192 inputs"),
        ((7, 128), (128, 64), "its 7 outputs are odd"),
    ],
)
@pytest.mark.parametrize("bits", [3, 4])
def test_a_shape_that_groups_do_not_fit_is_refused_with_the_linear_and_a_remedy(bits, shape, sizes, words):
    with pytest.raises(SchemeError, match=re.escape(f"blocks.3.mlp.fc1: {words}")) as caught:
        fit_scheme("blocks.3.mlp.fc1", shape, bits, None, sizes)
    assert f"so it cannot have {bits}-bit weights; use --scheme int8" in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 300).map(lambda n: 2 * n), st.integers(1, 40).map(lambda n: 64 * n))
def test_every_multiple_of_64_inputs_with_even_outputs_has_a_group_size_that_divides_it(outputs, inputs):
    scheme = fit_scheme("some.linear", (outputs, inputs), *W4A16)
    assert scheme.scale_shape((outputs, inputs)) == (outputs, inputs / scheme.group_size)
    assert scheme.group_size == (128 if inputs % 128 == 0 else 64)
