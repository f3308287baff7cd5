"""INT4 packing: equal to onnx's own to the bit, and read back by it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import TensorProto, numpy_helper

from qvlm_export.calibrate.checkpoint.packing import pack_codes
from qvlm_export.engines.graph.int4_packing import pack_nibbles, transpose_nibbles

CODES = arrays(np.int8, array_shapes(max_dims=3, max_side=12), elements=st.integers(-8, 7))


def onnx_bytes(codes):
    """The bytes that onnx itself stores for these codes."""
    tensor = onnx.helper.make_tensor("codes", TensorProto.INT4, codes.shape, codes.reshape(-1).tolist())
    # make_tensor keeps the packed bytes one to an int32.
    return np.array(list(tensor.int32_data), np.uint8)


@settings(deadline=None, max_examples=100)
@given(CODES)
def test_packed_codes_equal_those_of_onnx_bit_by_bit(codes):
    packed = pack_nibbles(codes)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(packed, onnx_bytes(codes))


@settings(deadline=None, max_examples=100)
@given(CODES)
def test_onnx_reads_the_codes_back(codes):
    raw = pack_nibbles(codes).tobytes()
    tensor = onnx.helper.make_tensor("codes", TensorProto.INT4, codes.shape, raw, raw=True)
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), codes)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([], []), ([-1], [0x0F]), ([1, 2], [0x21]), ([-8, 7, -1], [0x78, 0x0F]), ([[1, 2, 3], [4, 5, 6]], [0x21, 0x43, 0x65])],
)
def test_the_first_code_is_in_the_low_nibble(codes, expected):
    assert pack_nibbles(np.array(codes, np.int8)).tolist() == expected


def test_an_array_is_packed_in_logical_order_whatever_its_strides():
    codes = np.arange(-8, 7, dtype=np.int8).reshape(3, 5)
    np.testing.assert_array_equal(pack_nibbles(codes.T), pack_nibbles(np.ascontiguousarray(codes.T)))


@pytest.mark.parametrize("shape", [(2, 8), (6, 64), (258, 8), (256, 512), (514, 1032), (1022, 520)])
def test_nibbles_are_transposed_without_unpacking(shape):
    """Shapes with full and with partial tiles, against packing of the transposed codes."""
    codes = np.random.default_rng(0).integers(-8, 8, shape, np.int8)
    stored = pack_codes(codes, 4).view(np.uint8)
    np.testing.assert_array_equal(transpose_nibbles(stored), pack_nibbles(np.ascontiguousarray(codes.T)))
