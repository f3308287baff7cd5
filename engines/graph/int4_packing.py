"""INT4 packing in the layout of ONNX: codes are flattened, two to a byte, the first in the low nibble."""

from __future__ import annotations

import numpy as np

TILE = 256  # rows and bytes a row that are transposed at once


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Packs int8 codes in [-8, 7] of any shape; returns uint8 [ceil(size / 2)], an odd last code padded with 0."""
    flat = codes.reshape(-1).view(np.uint8)
    packed = np.zeros(-(-flat.size // 2), np.uint8)
    packed[: flat.size // 2] = flat[1::2] << 4
    packed |= flat[0::2] & 0xF
    return packed


def transpose_nibbles(stored: np.ndarray) -> np.ndarray:
    """Transposes packed codes [out, in] without unpacking them; out and in are even.

    stored: uint8 [out, in // 2], the even column in the low nibble, 8 added to every code. Returns what `pack_nibbles` makes
    of the codes [in, out], uint8 [in * out // 2]. Work is done in tiles that fit into the processor's cache, because either
    the reads or the writes go across rows.
    """
    rows, pairs = stored.shape
    packed = np.empty((2 * pairs, rows // 2), np.uint8)
    for row in range(0, rows, TILE):
        for pair in range(0, pairs, TILE):
            tile = stored[row : row + TILE, pair : pair + TILE] ^ np.uint8(0x88)  # subtracts 8 from both codes
            even, odd, out = tile[0::2], tile[1::2], slice(row // 2, (row + TILE) // 2)
            packed[2 * pair : 2 * (pair + TILE) : 2, out] = (even & 0x0F | odd << 4).T
            packed[2 * pair + 1 : 2 * (pair + TILE) : 2, out] = (even >> 4 | odd & 0xF0).T
    return packed.reshape(-1)
