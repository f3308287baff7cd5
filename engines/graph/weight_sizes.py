"""engines/graph/weight_sizes.py"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qvlm_export.calibrate.checkpoint.scheme import GROUPED_BITS, LinearScheme


@dataclass(frozen=True)
class Sizes:
    """Bytes of weights: as float16, and as planned; int4_bytes: those of it that are INT4 codes."""

    float16_bytes: int
    planned_bytes: int
    int4_bytes: int = 0

    @property
    def compression(self) -> float:
        return self.float16_bytes / self.planned_bytes


def estimate_sizes(shapes: Mapping[str, tuple[int, ...]], plan: Mapping[str, LinearScheme]) -> Sizes:
    """Sizes of the tensors `shapes` (name -> shape) when the linears of `plan` are quantized."""
    float16 = planned = int4 = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        float16 += 2 * count
        scheme = plan.get(name.removesuffix(".weight"))
        if scheme is None:
            planned += 2 * count
        else:
            scales = math.prod(scheme.scale_shape((shape[0], shape[1])))
            planned += count * scheme.stored_bits // 8 + scheme.scale_bytes * scales
            int4 += count // 2 if scheme.stored_bits == GROUPED_BITS else 0
    return Sizes(float16, planned, int4)
