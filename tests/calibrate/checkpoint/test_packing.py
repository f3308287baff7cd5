"""Packing of codes: unpacking inverts it, and it is bit-equal to the compressed-tensors library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from qvlm_export.calibrate.checkpoint.packing import pack_codes, unpack_codes

SHAPES = array_shapes(min_dims=2, max_dims=2, max_side=40)


@st.composite
def codes_and_bits(draw):
    bits = draw(st.sampled_from([3, 4]))
    return draw(arrays(np.int8, SHAPES, elements=st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))), bits


def random_codes(rows, columns, bits):
    half = 2 ** (bits - 1)
    return np.random.default_rng(rows * 100 + columns).integers(-half, half, (rows, columns)).astype(np.int8)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 10, 11, 16, 17, 32, 33])
def test_unpacking_inverts_packing(rows, columns, bits):
    codes = random_codes(rows, columns, bits)
    packed = pack_codes(codes, bits)
    assert packed.dtype == np.int32
    assert packed.shape == (rows, -(-columns * bits // 32))
    unpacked = unpack_codes(packed, bits, columns)
    assert unpacked.dtype == np.int8
    np.testing.assert_array_equal(unpacked, codes)


def test_the_first_code_is_in_the_lowest_bits():
    codes = np.array([[-8, -7, -6, -5, -4, -3, -2, -1]], np.int8)
    assert pack_codes(codes, 4).tolist() == [[0x76543210]]
    codes = np.array([[-4, -3, -2, -1, 0, 1, 2, 3]], np.int8)
    assert pack_codes(codes, 3).tolist() == [[0o76543210]]


def test_a_three_bit_code_may_span_two_words():
    codes = np.full((1, 11), -4, np.int8)
    codes[0, 10] = 3  # bits 30 to 32
    assert pack_codes(codes, 3).view(np.uint32).tolist() == [[0xC0000000, 1]]


@pytest.mark.parametrize("bits", [3, 4])
def test_unused_bits_of_the_last_word_are_zero(bits):
    codes = np.array([[2 ** (bits - 1) - 1]], np.int8)
    assert pack_codes(codes, bits).tolist() == [[2**bits - 1]]


@pytest.mark.parametrize("bits", [3, 4])
def test_columns_of_a_transposed_array_are_packed_in_order(bits):
    codes = random_codes(9, 16, bits)
    np.testing.assert_array_equal(pack_codes(codes.T, bits), pack_codes(np.ascontiguousarray(codes.T), bits))


@settings(deadline=None, max_examples=200)
@given(codes_and_bits())
def test_packing_equals_that_of_compressed_tensors(case):
    codes, bits = case
    packed = pack_codes(codes, bits)
    np.testing.assert_array_equal(packed, pack_to_int32(torch.from_numpy(codes), bits).numpy())
    reference = unpack_from_int32(torch.from_numpy(packed), bits, torch.Size(codes.shape))
    np.testing.assert_array_equal(unpack_codes(packed, bits, codes.shape[1]), reference.numpy())
    np.testing.assert_array_equal(unpack_codes(packed, bits, codes.shape[1]), codes)
