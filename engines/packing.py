"""INT4 codes packed as ONNX stores them: flattened, two to a byte, the first in the low nibble."""

from __future__ import annotations

import numpy as np


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """int8 codes of any shape, values in [-8, 7] -> uint8 [ceil(size / 2)]; an odd tail is padded with 0."""
    flat = codes.reshape(-1).view(np.uint8)
    packed = np.zeros(-(-flat.size // 2), np.uint8)
    packed[: flat.size // 2] = flat[1::2] << 4
    packed |= flat[0::2] & 0xF
    return packed
