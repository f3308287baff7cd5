"""INT4 codes packed as the compressed-tensors format stores them. numpy only.

Eight codes share an int32, the first in the lowest nibble, each stored with 8 added.
"""

from __future__ import annotations

import numpy as np


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """codes int8 [rows, columns] in [-8, 7] -> int32 [rows, ceil(columns / 8)]; the tail is padded with code -8."""
    rows, columns = codes.shape
    padded = -(-columns // 8) * 8
    nibbles = np.zeros((rows, padded), np.uint8)
    nibbles[:, :columns] = (codes + 8).view(np.uint8)
    return np.ascontiguousarray(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).view("<i4")


def unpack_int4(packed: np.ndarray, columns: int) -> np.ndarray:
    """int32 [rows, ceil(columns / 8)] -> int8 codes [rows, columns]."""
    pairs = np.ascontiguousarray(packed).view(np.uint8)
    nibbles = np.empty((packed.shape[0], pairs.shape[1] * 2), np.int8)
    nibbles[:, 0::2] = pairs & 0xF
    nibbles[:, 1::2] = pairs >> 4
    return nibbles[:, :columns] - np.int8(8)
