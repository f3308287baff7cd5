"""Choosing scales and rounding to codes. torch.

Symmetric quantizers with zero-point 0. Scales are rounded to the type they are stored in *before* the codes are made, so
that the codes are right for the scale the engine multiplies with.
"""

from __future__ import annotations

import numpy as np
import torch

from calibrate.calibrated import QuantizedLinear
from calibrate.scheme import LinearScheme

# The smallest normal float16: below it a scale loses bits, and a zero scale would divide by zero.
MIN_FLOAT16_SCALE = 2.0**-14
MIN_FLOAT32_SCALE = 2.0**-30
MAX_FLOAT16 = 65504.0


def weight_scale(amax: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """Range -> scale in its stored type: float16 for W4A16, float32 for W8A8. amax: float32 [out] or [out, groups]."""
    if scheme.group_size is None:
        return (amax / scheme.qmax).clamp(min=MIN_FLOAT32_SCALE)
    return (amax / scheme.qmax).clamp(min=MIN_FLOAT16_SCALE).half()


def group_amax(weight: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """Largest magnitude per group or per output channel. weight: float32 [out, in] -> [out, groups] or [out]."""
    if scheme.group_size is None:
        return weight.abs().amax(dim=1)
    return weight.reshape(weight.shape[0], -1, scheme.group_size).abs().amax(dim=2)


def round_to_codes(weight: torch.Tensor, scale: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """Round to nearest, ties to even. weight: float32 [out, in], scale as stored -> int8 [out, in]."""
    wide = scale.float()
    if scheme.group_size is None:
        scaled = weight / wide[:, None]
    else:
        scaled = (weight.reshape(*wide.shape, scheme.group_size) / wide[:, :, None]).reshape(weight.shape)
    return scaled.round_().clamp_(scheme.qmin, scheme.qmax).to(torch.int8)


def activation_scale(amax: float, num_bits: int = 8) -> float:
    """Per-tensor activation scale, rounded up to a float16 value so that `amax` itself is not clipped."""
    exact = max(amax / (2 ** (num_bits - 1) - 1), MIN_FLOAT16_SCALE)
    rounded = np.float16(exact)
    # As Python floats: numpy would round `exact` to float16 before it compares.
    return float(rounded if float(rounded) >= exact else np.nextafter(rounded, np.float16(np.inf)))


def quantize_linear(weight: torch.Tensor, scheme: LinearScheme, input_amax: float | None) -> QuantizedLinear:
    """Round-to-nearest with absmax ranges. weight: float32 [out, in]; input_amax for 8-bit activations."""
    scale = weight_scale(group_amax(weight, scheme), scheme)
    codes = round_to_codes(weight, scale, scheme)
    input_scale = None if scheme.activation_bits is None else activation_scale(float(input_amax or 0.0))
    return QuantizedLinear(scheme, codes.numpy(), scale.numpy(), input_scale)
