"""INT4 packing of calibrated checkpoints: its own inverse, and bit equal to the compressed-tensors library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from calibrate.packing import pack_int4, unpack_int4

CODES = arrays(np.int8, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.integers(-8, 7))


def random_codes(rows, columns):
    return np.random.default_rng(rows * 100 + columns).integers(-8, 8, (rows, columns)).astype(np.int8)


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 16, 17])
def test_unpacking_undoes_packing(rows, columns):
    codes = random_codes(rows, columns)
    packed = pack_int4(codes)
    assert packed.dtype == np.int32
    assert packed.shape == (rows, -(-columns // 8))
    unpacked = unpack_int4(packed, columns)
    assert unpacked.dtype == np.int8
    np.testing.assert_array_equal(unpacked, codes)


def test_the_first_code_is_in_the_lowest_nibble():
    codes = np.array([[-8, -7, -6, -5, -4, -3, -2, -1]], np.int8)
    assert pack_int4(codes).tolist() == [[0x76543210]]


def test_a_tail_is_padded_with_the_code_minus_eight():
    assert pack_int4(np.array([[7]], np.int8)).tolist() == [[0x0000000F]]


def test_columns_of_a_transposed_array_are_packed_in_order():
    codes = random_codes(9, 16)
    np.testing.assert_array_equal(pack_int4(codes.T), pack_int4(np.ascontiguousarray(codes.T)))


@settings(deadline=None, max_examples=100)
@given(CODES)
def test_equal_to_compressed_tensors(codes):
    packed = pack_int4(codes)
    np.testing.assert_array_equal(packed, pack_to_int32(torch.from_numpy(codes), 4).numpy())
    theirs = unpack_from_int32(torch.from_numpy(packed), 4, torch.Size(codes.shape))
    np.testing.assert_array_equal(unpack_int4(packed, codes.shape[1]), theirs.numpy())
    np.testing.assert_array_equal(unpack_int4(packed, codes.shape[1]), codes)
