"""Size of a model's weights in bytes, in float16 and quantized, computed from shapes and schemes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qvlm_export.calibrate.checkpoint.scheme import GROUPED_BITS, LinearScheme


@dataclass(frozen=True)
class Sizes:
    """Bytes of a set of weights.

    float16_bytes: all in float16. quantized_bytes: quantized as their schemes say, with scales. int4_bytes: the part of
    quantized_bytes that is INT4 codes.
    """

    float16_bytes: int
    quantized_bytes: int
    int4_bytes: int = 0

    @property
    def compression(self) -> float:
        """How many times smaller the quantized weights are than float16 ones."""
        return self.float16_bytes / self.quantized_bytes


def estimate_sizes(shapes: Mapping[str, tuple[int, ...]], schemes: Mapping[str, LinearScheme]) -> Sizes:
    """Returns the sizes of the tensors `shapes` (name -> shape), of which those of the linears in `schemes` are quantized.

    Scales are included; tensors without a scheme count as float16.
    """
    float16_bytes = quantized_bytes = int4_bytes = 0
    for name, shape in shapes.items():
        num_weights = math.prod(shape)
        float16_bytes += 2 * num_weights
        scheme = schemes.get(name.removesuffix(".weight"))
        if scheme is None:
            quantized_bytes += 2 * num_weights
        else:
            num_scales = math.prod(scheme.scale_shape((shape[0], shape[1])))
            quantized_bytes += num_weights * scheme.stored_bits // 8 + scheme.scale_bytes * num_scales
            int4_bytes += num_weights // 2 if scheme.stored_bits == GROUPED_BITS else 0
    return Sizes(float16_bytes, quantized_bytes, int4_bytes)
