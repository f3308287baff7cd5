"""Choosing ranges by the error they cause in the output. torch.

A range that covers the largest value wastes steps on it; a smaller one clips it. Candidates are fractions of the largest
magnitude (the paper's percentiles are a coarse form of it), judged by the output error on calibration inputs.
"""

from __future__ import annotations

import torch

from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.quantization.quantizer import (
    activation_scale,
    expand_scales,
    fake_quantize,
    group_amax,
    round_to_codes,
    squared_sum,
    weight_scale,
)

WEIGHT_FRACTIONS = tuple(1.0 - 0.04 * i for i in range(16))
ACTIVATION_FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)


def search_weight_scale(weight: torch.Tensor, gram: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """The scale, as stored, whose rounding error e costs least as e H e^T, for each group (or row) on its own.

    weight: float32 [out, in]; gram: [in, in]. For 4-bit groups H is the group's own block of the Gram matrix, for rows of
    8-bit weights its diagonal: a full product would cost in^2 for each row and candidate, and clips little at 8 bits.
    """
    amax = group_amax(weight, scheme)
    best_scale = weight_scale(amax, scheme)
    best_error = torch.full_like(amax, torch.inf)
    for fraction in WEIGHT_FRACTIONS:
        scale = weight_scale(amax * fraction, scheme)
        error = weight - round_to_codes(weight, scale, scheme).float() * expand_scales(scale, weight.shape[1])
        cost = _cost(error, gram, scheme)
        better = cost < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, cost, best_error)
    return best_scale


def _cost(error: torch.Tensor, gram: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    if scheme.group_size is None:
        return (error.square() * gram.diagonal()).sum(dim=1)
    size = scheme.group_size
    groups = error.reshape(error.shape[0], -1, size)
    blocks = torch.stack([gram[i : i + size, i : i + size] for i in range(0, len(gram), size)])
    return torch.einsum("ogi,gij,ogj->og", groups, blocks, groups)


def search_activation_scale(inputs: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor, num_bits: int) -> float:
    """The static per-tensor scale whose rounding moves the linears' output least from the float one.

    inputs: float32 [tokens, in] that will be quantized; wanted: the float layer's inputs, same shape; weight: float32
    [out, in] of all linears that share the input.
    """
    amax = float(inputs.abs().max())
    best = (float("inf"), activation_scale(amax, num_bits))
    for fraction in ACTIVATION_FRACTIONS:
        scale = activation_scale(amax * fraction, num_bits)
        moved = fake_quantize(inputs, scale, num_bits) - wanted
        best = min(best, (squared_sum(matmul(moved, weight.T)), scale))
    return best[1]
