"""Clipping ranges by output error: the fraction of the absmax range with the least squared error of the linears' output.

A range that covers the largest value spends steps on it, a smaller one clips it. Candidates are fractions of the largest
magnitude (the percentiles of Q-VLM are a coarse form of it), and each is judged by the output error on calibration inputs.
"""

from __future__ import annotations

import torch

from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.quantization.hessian import HessianFactor
from qvlm_export.calibrate.quantization.quantizer import (
    CHUNK_ROWS,
    activation_scale,
    covering_scale,
    expand_scales,
    fake_quantize,
    group_amax,
    round_to_codes,
    squared_sum,
    stored_weight_scale,
    weight_scale,
)

WEIGHT_FRACTIONS = tuple(1.0 - 0.04 * i for i in range(16))
RESIDUAL_FRACTIONS = tuple(1.06 - 0.03 * i for i in range(13))
ACTIVATION_FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)


def search_weight_scale(weight: torch.Tensor, hessian: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """The scale, as stored, whose rounding error e has the least output error e H e^T, for each group (or row) on its own.

    weight: float32 [out, in]; hessian: H, float32 [in, in]. Only the group's own block of H is used for groups, and only the
    diagonal of H for whole rows (8-bit weights): the full product would cost in^2 operations for each row and candidate,
    and little is clipped at 8 bits.
    """
    amax = group_amax(weight, scheme)
    best_scale = weight_scale(amax, scheme)
    least = torch.full_like(amax, torch.inf)
    for fraction in WEIGHT_FRACTIONS:
        scale = weight_scale(amax * fraction, scheme)
        error = weight - round_to_codes(weight, scale, scheme).float() * expand_scales(scale, weight.shape[1])
        output_error = _measure_output_error(error, hessian, scheme)
        better = output_error < least
        best_scale = torch.where(better, scale, best_scale)
        least = torch.where(better, output_error, least)
    return best_scale


def search_residual_scale(weight: torch.Tensor, factor: HessianFactor, scheme: LinearScheme) -> torch.Tensor:
    """The scale, as stored, with the least output error that GPTQ's compensation leaves, for each group on its own.

    weight: float32 [out, in]; factor: of its damped input Hessian. An error e_j of column j costs L_jj^2 e_j^2 after it was
    compensated, so that is what ranges trade clipping against steps by. Candidates are RESIDUAL_FRACTIONS of the smallest
    range that covers the group. Scales of whole rows (6 and 8 bits) cover them, as little is clipped there.
    """
    covering = covering_scale(weight, scheme)
    if scheme.group_size is None:
        return covering
    energy = factor.residual_energy().view(1, -1, scheme.group_size)
    parts = zip(weight.split(CHUNK_ROWS), covering.split(CHUNK_ROWS), strict=True)
    return torch.cat([_search_groups(rows.view(*scale.shape, -1), energy, scale, scheme) for rows, scale in parts])


def _search_groups(groups: torch.Tensor, energy: torch.Tensor, covering: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """`search_residual_scale` for weights [rows, groups, size], energies [1, groups, size] and scales [rows, groups]."""
    best, least = covering, torch.full(covering.shape, torch.inf, device=covering.device)
    for fraction in RESIDUAL_FRACTIONS:
        scale = stored_weight_scale(covering.float() * fraction, scheme)
        steps = scale.float()[..., None]
        codes = (groups / steps).round_().clamp_(scheme.qmin, scheme.qmax)
        error = codes.mul_(steps).sub_(groups).square_().mul_(energy).sum(-1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _measure_output_error(error: torch.Tensor, hessian: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """e H e^T by row or group, with the parts of H that `search_weight_scale` names: float32 [out] or [out, groups]."""
    if scheme.group_size is None:
        return (error.square() * hessian.diagonal()).sum(dim=1)
    size = scheme.group_size
    groups = error.reshape(error.shape[0], -1, size)
    blocks = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, len(hessian), size)])
    return torch.einsum("ogi,gij,ogj->og", groups, blocks, groups)


def search_activation_scale(inputs: torch.Tensor, float_inputs: torch.Tensor, weight: torch.Tensor, num_bits: int) -> float:
    """The static per-tensor scale at which the linears' output is closest to that of the float model.

    inputs: X_q, float32 [tokens, in], which will be quantized; float_inputs: X of the float model, same shape; weight:
    float32 [out, in] of all linears that share the input; num_bits: of the codes.
    """
    amax = float(inputs.abs().max())
    best = (float("inf"), activation_scale(amax, num_bits))
    for fraction in ACTIVATION_FRACTIONS:
        scale = activation_scale(amax * fraction, num_bits)
        error = fake_quantize(inputs, scale, num_bits) - float_inputs
        best = min(best, (squared_sum(matmul(error, weight.T)), scale))
    return best[1]
