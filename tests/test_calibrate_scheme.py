"""Schemes: what is refused and in which words, and the group size that a width is given."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.errors import UserError
from calibrate.scheme import W8A8, LinearScheme, SchemeError, w4a16


@pytest.mark.parametrize(
    ("weight", "activation", "name"), [(4, 8, "W4A8"), (8, None, "W8A16"), (3, None, "W3A16"), (6, 6, "W6A6")]
)
def test_bits_without_a_kernel_are_refused_by_name(weight, activation, name):
    with pytest.raises(SchemeError, match=f"^{name} has no TensorRT kernel; use W4A16 or W8A8$"):
        LinearScheme(weight_bits=weight, activation_bits=activation, group_size=None)


@pytest.mark.parametrize(("weight", "activation", "group"), [(4, None, None), (8, 8, 128)])
def test_groups_belong_to_four_bits_only(weight, activation, group):
    with pytest.raises(SchemeError, match=r"^W\dA\d+: group_size belongs to 4-bit weights and to them only$"):
        LinearScheme(weight_bits=weight, activation_bits=activation, group_size=group)


def test_a_refusal_is_an_error_for_users():
    assert issubclass(SchemeError, UserError)


def test_ranges_of_codes():
    four = LinearScheme(weight_bits=4, activation_bits=None, group_size=64)
    assert (four.name, four.qmin, four.qmax) == ("W4A16", -8, 7)
    assert (W8A8.name, W8A8.qmin, W8A8.qmax) == ("W8A8", -127, 127)


def test_shapes_of_scales():
    assert LinearScheme(4, None, 64).scale_shape((6, 256)) == (6, 4)
    assert W8A8.scale_shape((6, 256)) == (6,)


@pytest.mark.parametrize(
    ("inputs", "group"), [(128, 128), (64, 64), (192, 64), (4096, 128), (13824, 128), (11008, 128), (320, 64)]
)
def test_the_largest_group_that_divides_the_inputs_is_chosen(inputs, group):
    assert w4a16("some.linear", (8, inputs)) == LinearScheme(weight_bits=4, activation_bits=None, group_size=group)


def test_a_given_group_size_is_kept():
    assert w4a16("some.linear", (8, 256), (64,)).group_size == 64


@pytest.mark.parametrize(
    ("shape", "sizes", "words"),
    [
        ((8, 96), (128, 64), "128 nor 64 does not divide its 96 inputs"),
        ((8, 192), (128,), "128 does not divide its 192 inputs"),
        ((7, 128), (128, 64), "its 7 outputs are odd"),
    ],
)
def test_a_width_that_cannot_be_int4_is_refused_with_the_linear_and_the_way_out(shape, sizes, words):
    with pytest.raises(SchemeError, match=re.escape(f"blocks.3.mlp.fc1: {words}")) as caught:
        w4a16("blocks.3.mlp.fc1", shape, sizes)
    assert "--scheme int8" in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 300).map(lambda n: 2 * n), st.integers(1, 40).map(lambda n: 64 * n))
def test_every_multiple_of_64_with_even_outputs_has_a_group_that_divides_it(outputs, inputs):
    scheme = w4a16("some.linear", (outputs, inputs))
    assert scheme.scale_shape((outputs, inputs)) == (outputs, inputs / scheme.group_size)
    assert scheme.group_size == (128 if inputs % 128 == 0 else 64)
