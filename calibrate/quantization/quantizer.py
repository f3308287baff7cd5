"""Symmetric uniform quantizers (zero-point 0): scales from ranges, round-to-nearest, and fake quantization.

Scales are rounded to the type they are stored in *before* the codes are computed, so that the codes are right for the scale
that the engine multiplies by.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from qvlm_export.calibrate.checkpoint.calibrated import QuantizedLinear
from qvlm_export.calibrate.checkpoint.scheme import BFLOAT16, MAX_FLOAT16, LinearScheme

# The smallest normal float16: below it a scale loses bits, and a zero scale would divide by zero.
MIN_FLOAT16_SCALE = 2.0**-14
MIN_FLOAT32_SCALE = 2.0**-30
CHUNK_ROWS = 256  # rows quantized at a time, few enough to stay in the processor's cache


def weight_scale(amax: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """The scale, as stored, of a clipping range: float16 [out, groups], or float32 [out] for per-channel schemes.

    amax: float32 [out, groups] or [out].
    """
    return stored_weight_scale(amax / scheme.qmax, scheme)


def stored_weight_scale(scale: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """A float32 scale [out, groups] or [out] in the type it is stored in, float16 or float32, and never 0.

    For a bfloat16 graph, scales of groups are values that both float16 and bfloat16 can hold.
    """
    if scheme.group_size is None:
        return scale.clamp(min=MIN_FLOAT32_SCALE).reshape(len(scale))
    scale = scale.clamp(min=MIN_FLOAT16_SCALE)
    return (scale.bfloat16() if scheme.float_type == BFLOAT16 else scale).half()


def group_amax(weight: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """The largest magnitude of each group or output channel, [out, groups] or [out]. weight: float32 [out, in]."""
    if scheme.group_size is None:
        return weight.abs().amax(dim=1)
    return weight.reshape(weight.shape[0], -1, scheme.group_size).abs().amax(dim=2)


def covering_scale(weight: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """The smallest scale, as stored, at which every weight has a code. weight: float32 [out, in].

    Codes of groups reach one further below zero than above. A group whose largest magnitude is negative therefore has
    smaller steps than with that magnitude at qmax, which is 1.2 dB less noise at 4 bits and 2.5 dB at 3.
    """
    groups = weight.reshape(len(weight), -1, scheme.group_size or weight.shape[1])
    lowest, highest = groups.aminmax(dim=2)
    scale = torch.maximum(highest / scheme.qmax, lowest / scheme.qmin)
    return stored_weight_scale(scale if scheme.group_size is not None else scale[:, 0], scheme)


def round_to_codes(weight: torch.Tensor, scale: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """Codes int8 [out, in] by round-to-nearest, ties to even. weight: float32 [out, in]; scale: as stored."""
    float_scale = scale.float()
    if scheme.group_size is None:
        scaled = weight / float_scale[:, None]
    else:
        scaled = (weight.reshape(*float_scale.shape, scheme.group_size) / float_scale[:, :, None]).reshape(weight.shape)
    return scaled.round_().clamp_(scheme.qmin, scheme.qmax).to(torch.int8)


def activation_scale(amax: float, num_bits: int) -> float:
    """The per-tensor activation scale of a range, rounded up to a float16 value so that `amax` itself is not clipped.

    A scale that float16 cannot hold, as only bfloat16 graphs have it, is returned as it is; see `stored_input_scale`.
    """
    exact = max(amax / (2 ** (num_bits - 1) - 1), MIN_FLOAT16_SCALE)
    if exact > MAX_FLOAT16:
        return exact
    rounded = np.float16(exact)
    # As Python floats: numpy would round `exact` to float16 before it compares.
    return float(rounded if float(rounded) >= exact else np.nextafter(rounded, np.float16(np.inf)))


def activation_scale_nearest(scale: float) -> float:
    """The float16 value nearest to a searched scale, never 0; the scale itself where float16 cannot hold it."""
    return scale if scale > MAX_FLOAT16 else float(np.float16(max(scale, MIN_FLOAT16_SCALE)))


def stored_input_scale(scale: float, scheme: LinearScheme) -> float:
    """An activation scale as a value of the graph's float type: rounded up to bfloat16 for such a graph."""
    if scheme.float_type != BFLOAT16:
        return scale
    rounded = float(torch.tensor(scale).bfloat16())
    return rounded if rounded >= scale else float(torch.tensor(rounded * (1 + 2**-7)).bfloat16())


def fake_quantize(x: torch.Tensor, scale: float, num_bits: int) -> torch.Tensor:
    """The activation as the graph quantizes and dequantizes it: ties to even, codes -2^(b-1) .. 2^(b-1) - 1.

    x: float32 of any shape, is not changed. Codes saturate at the lowest one as in QuantizeLinear, although calibrated
    scales use only +-(2^(b-1) - 1).
    """
    return (x / scale).round_().clamp_(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1).mul_(scale)


def squared_sum(x: torch.Tensor) -> float:
    """The sum of squares, to the same bits on any number of threads: of rows in float32, over rows in float64 by numpy."""
    return float(x.square().sum(dim=-1).double().cpu().numpy().sum())


def sqnr_db(exact: torch.Tensor, rounded: torch.Tensor) -> float | None:
    """Signal-to-quantization-noise ratio in dB, 10 log10 of the energies of signal and error; None when either is 0."""
    energy, error = squared_sum(exact), squared_sum(exact - rounded)
    return 10 * math.log10(energy / error) if energy > 0 and error > 0 else None


def quantize_linear(weight: torch.Tensor, scheme: LinearScheme, input_amax: float | None) -> QuantizedLinear:
    """The linear quantized by round-to-nearest with absmax ranges (the RTN baseline).

    weight: floats of any type [out, in]; input_amax: the range of the input, used where the scheme quantizes activations.
    """
    codes, scales = torch.empty(weight.shape, dtype=torch.int8), []
    for start in range(0, len(weight), CHUNK_ROWS):
        rows = weight[start : start + CHUNK_ROWS].float()
        scales.append(weight_scale(group_amax(rows, scheme), scheme))
        codes[start : start + CHUNK_ROWS] = round_to_codes(rows, scales[-1], scheme)
    bits = scheme.activation_bits
    input_scale = None if bits is None else stored_input_scale(activation_scale(float(input_amax or 0.0), bits), scheme)
    return QuantizedLinear(scheme, codes.numpy(), torch.cat(scales).cpu().numpy(), input_scale)


def expand_scales(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """The scale of every weight, float32 [out, columns], from scales [out] or [out, groups]."""
    groups = scale.float().reshape(scale.shape[0], -1)
    return groups.repeat_interleave(columns // groups.shape[1], dim=1)
