"""Codes of 3 and 4 bits packed as the compressed-tensors format stores them. numpy only.

Each row is one stream of bits cut into int32: the first code in the lowest bits, every code stored with half its range
added, so that it is not negative, and no bit left out between codes or between words.
"""

from __future__ import annotations

import numpy as np

CHUNK_ROWS = 64
LANES = 8  # codes handled together: they fill `num_bits` whole bytes, and an int32 at most


def pack_codes(codes: np.ndarray, num_bits: int) -> np.ndarray:
    """codes int8 [rows, columns] of 3 or 4 bits -> int32 [rows, ceil(columns * num_bits / 32)]; the tail's bits are 0."""
    rows, columns = codes.shape
    if num_bits == 4 and columns % LANES == 0:
        return _packed_nibbles(codes)
    groups, words = -(-columns // LANES), -(-columns * num_bits // 32)
    stored = np.zeros((rows, groups * LANES), np.uint8)
    stored[:, :columns] = (codes + (1 << (num_bits - 1))).view(np.uint8)
    lanes = np.zeros((rows, groups), "<u4")
    for lane in range(LANES):
        lanes |= stored[:, lane::LANES].astype(np.uint32) << np.uint32(num_bits * lane)
    stream = lanes.view(np.uint8).reshape(rows, groups, 4)[:, :, :num_bits].reshape(rows, groups * num_bits)
    return _resized(stream, 4 * words).view("<i4")


def _packed_nibbles(codes: np.ndarray) -> np.ndarray:
    """Two to a byte, some rows at a time, which stay in the processor's cache."""
    rows, columns = codes.shape
    packed = np.empty((rows, columns // 2), np.uint8)
    for start in range(0, rows, CHUNK_ROWS):
        stored = np.add(codes[start : start + CHUNK_ROWS], 8, order="C").view("<u2")  # the even column in the low byte
        np.bitwise_or(stored, stored >> 4, out=packed[start : start + CHUNK_ROWS], casting="unsafe")
    return packed.view("<i4")


def unpack_codes(packed: np.ndarray, num_bits: int, columns: int) -> np.ndarray:
    """int32 [rows, ceil(columns * num_bits / 32)] -> int8 codes [rows, columns]."""
    rows, groups = packed.shape[0], -(-columns // LANES)
    stream = _resized(np.ascontiguousarray(packed).view(np.uint8), groups * num_bits)
    lanes = np.zeros((rows, groups, 4), np.uint8)
    lanes[:, :, :num_bits] = stream.reshape(rows, groups, num_bits)
    wide = lanes.view("<u4")[:, :, 0]
    codes = np.empty((rows, groups * LANES), np.int8)
    for lane in range(LANES):
        codes[:, lane::LANES] = (wide >> np.uint32(num_bits * lane)) & np.uint32((1 << num_bits) - 1)
    return codes[:, :columns] - np.int8(1 << (num_bits - 1))


def _resized(stream: np.ndarray, count: int) -> np.ndarray:
    """uint8 [rows, n] -> [rows, count]: cut, or filled up with zeros."""
    resized = np.zeros((stream.shape[0], count), np.uint8)
    kept = min(count, stream.shape[1])
    resized[:, :kept] = stream[:, :kept]
    return resized
