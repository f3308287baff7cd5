"""Choosing scales and rounding to codes. torch.

Symmetric quantizers with zero-point 0. Scales are rounded to the type they are stored in *before* the codes are made, so
that the codes are right for the scale the engine multiplies with.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from qvlm_export.calibrate.checkpoint.calibrated import QuantizedLinear
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme

# The smallest normal float16: below it a scale loses bits, and a zero scale would divide by zero.
MIN_FLOAT16_SCALE = 2.0**-14
MIN_FLOAT32_SCALE = 2.0**-30
CHUNK_ROWS = 256


def weight_scale(amax: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """Range -> scale as stored: float16 for groups, float32 for output channels. amax: float32 [out] or [out, groups]."""
    return stored_weight_scale(amax / scheme.qmax, scheme)


def stored_weight_scale(scale: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """float32 [out, groups] or [out] -> as stored: float16 [out, groups] or float32 [out], never 0."""
    if scheme.group_size is None:
        return scale.clamp(min=MIN_FLOAT32_SCALE).reshape(len(scale))
    return scale.clamp(min=MIN_FLOAT16_SCALE).half()


def group_amax(weight: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """Largest magnitude per group or per output channel. weight: float32 [out, in] -> [out, groups] or [out]."""
    if scheme.group_size is None:
        return weight.abs().amax(dim=1)
    return weight.reshape(weight.shape[0], -1, scheme.group_size).abs().amax(dim=2)


def covering_scale(weight: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """The smallest scale, as stored, at which every weight has a code. weight: float32 [out, in].

    Grouped codes reach one further below zero than above, so a group whose largest value is negative has smaller steps than
    with its largest magnitude at qmax: 1.2 dB less noise at 4 bits, 2.5 dB at 3.
    """
    groups = weight.reshape(len(weight), -1, scheme.group_size or weight.shape[1])
    lowest, highest = groups.aminmax(dim=2)
    scale = torch.maximum(highest / scheme.qmax, lowest / scheme.qmin)
    return stored_weight_scale(scale if scheme.group_size is not None else scale[:, 0], scheme)


def round_to_codes(weight: torch.Tensor, scale: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """Round to nearest, ties to even. weight: float32 [out, in], scale as stored -> int8 [out, in]."""
    wide = scale.float()
    if scheme.group_size is None:
        scaled = weight / wide[:, None]
    else:
        scaled = (weight.reshape(*wide.shape, scheme.group_size) / wide[:, :, None]).reshape(weight.shape)
    return scaled.round_().clamp_(scheme.qmin, scheme.qmax).to(torch.int8)


def activation_scale(amax: float, num_bits: int) -> float:
    """Per-tensor activation scale, rounded up to a float16 value so that `amax` itself is not clipped."""
    exact = max(amax / (2 ** (num_bits - 1) - 1), MIN_FLOAT16_SCALE)
    rounded = np.float16(exact)
    # As Python floats: numpy would round `exact` to float16 before it compares.
    return float(rounded if float(rounded) >= exact else np.nextafter(rounded, np.float16(np.inf)))


def activation_scale_nearest(scale: float) -> float:
    """The nearest float16 value to a searched scale."""
    return float(np.float16(max(scale, MIN_FLOAT16_SCALE)))


def fake_quantize(x: torch.Tensor, scale: float, num_bits: int) -> torch.Tensor:
    """What the graph does to an activation: round half to even, codes -2^(b-1) .. 2^(b-1) - 1, and back to float.

    Codes saturate at the lowest one too, as QuantizeLinear does, though calibrated scales use only +-(2^(b-1) - 1).
    """
    return (x / scale).round_().clamp_(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1).mul_(scale)


def squared_sum(x: torch.Tensor) -> float:
    """Sum of squares, the same to the last bit on any number of threads: rows in float32, their sum in float64 by numpy."""
    return float(x.square().sum(dim=-1).double().cpu().numpy().sum())


def sqnr_db(exact: torch.Tensor, rounded: torch.Tensor) -> float | None:
    """10 log10 of the energy over the error's; None when either is 0."""
    energy, error = squared_sum(exact), squared_sum(exact - rounded)
    return 10 * math.log10(energy / error) if energy > 0 and error > 0 else None


def quantize_linear(weight: torch.Tensor, scheme: LinearScheme, input_amax: float | None) -> QuantizedLinear:
    """Round-to-nearest with absmax ranges. weight: floats of any type [out, in]; input_amax for quantized activations.

    Some rows at a time, which stay in the processor's cache from one operation to the next.
    """
    codes, scales = torch.empty(weight.shape, dtype=torch.int8), []
    for start in range(0, len(weight), CHUNK_ROWS):
        rows = weight[start : start + CHUNK_ROWS].float()
        scales.append(weight_scale(group_amax(rows, scheme), scheme))
        codes[start : start + CHUNK_ROWS] = round_to_codes(rows, scales[-1], scheme)
    bits = scheme.activation_bits
    input_scale = None if bits is None else activation_scale(float(input_amax or 0.0), bits)
    return QuantizedLinear(scheme, codes.numpy(), torch.cat(scales).cpu().numpy(), input_scale)


def expand_scales(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """Scales [out] or [out, groups] spread to float32 [out, columns]."""
    wide = scale.float().reshape(scale.shape[0], -1)
    return wide.repeat_interleave(columns // wide.shape[1], dim=1)
