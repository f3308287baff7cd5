"""Packing of 3-bit and 4-bit codes into int32, as the compressed-tensors format stores them.

Each row is one stream of bits that is cut into int32 words, with the first code in the lowest bits. Half of the range is
added to every code, so that it is not negative. No bit is left unused between codes or between words.
"""

from __future__ import annotations

import numpy as np

CHUNK_ROWS = 64  # so few rows stay in the processor's cache
LANES = 8  # codes packed together: they fill exactly `num_bits` bytes, which is at most one int32


def pack_codes(codes: np.ndarray, num_bits: int) -> np.ndarray:
    """Packs codes int8 [rows, columns] of 3 or 4 bits into int32 [rows, ceil(columns * num_bits / 32)].

    The unused highest bits of the last word are 0.
    """
    rows, columns = codes.shape
    if num_bits == 4 and columns % LANES == 0:
        return _pack_nibbles(codes)
    groups, words = -(-columns // LANES), -(-columns * num_bits // 32)
    biased = np.zeros((rows, groups * LANES), np.uint8)
    biased[:, :columns] = (codes + (1 << (num_bits - 1))).view(np.uint8)
    lanes = np.zeros((rows, groups), "<u4")
    for lane in range(LANES):
        lanes |= biased[:, lane::LANES].astype(np.uint32) << np.uint32(num_bits * lane)
    stream = lanes.view(np.uint8).reshape(rows, groups, 4)[:, :, :num_bits].reshape(rows, groups * num_bits)
    return _resize_rows(stream, 4 * words).view("<i4")


def _pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Faster `pack_codes` for 4-bit codes and whole words: two codes to a byte."""
    rows, columns = codes.shape
    packed = np.empty((rows, columns // 2), np.uint8)
    for start in range(0, rows, CHUNK_ROWS):
        biased = np.add(codes[start : start + CHUNK_ROWS], 8, order="C").view("<u2")  # the even column in the low byte
        np.bitwise_or(biased, biased >> 4, out=packed[start : start + CHUNK_ROWS], casting="unsafe")
    return packed.view("<i4")


def unpack_codes(packed: np.ndarray, num_bits: int, columns: int) -> np.ndarray:
    """The codes int8 [rows, columns] that `pack_codes` packed into int32 [rows, ceil(columns * num_bits / 32)]."""
    rows, groups = packed.shape[0], -(-columns // LANES)
    stream = _resize_rows(np.ascontiguousarray(packed).view(np.uint8), groups * num_bits)
    lanes = np.zeros((rows, groups, 4), np.uint8)
    lanes[:, :, :num_bits] = stream.reshape(rows, groups, num_bits)
    wide = lanes.view("<u4")[:, :, 0]
    codes = np.empty((rows, groups * LANES), np.int8)
    for lane in range(LANES):
        codes[:, lane::LANES] = (wide >> np.uint32(num_bits * lane)) & np.uint32((1 << num_bits) - 1)
    return codes[:, :columns] - np.int8(1 << (num_bits - 1))


def _resize_rows(stream: np.ndarray, count: int) -> np.ndarray:
    """uint8 [rows, n] -> [rows, count], truncated or padded with zeros."""
    resized = np.zeros((stream.shape[0], count), np.uint8)
    common = min(count, stream.shape[1])
    resized[:, :common] = stream[:, :common]
    return resized
