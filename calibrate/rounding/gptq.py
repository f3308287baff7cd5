"""Rounding a weight so that its output error is least, not its own error. torch.

GPTQ (Frantar et al. 2022, arXiv 2210.17323, section 3): columns are rounded one after another, and the error of each is
made up for by the columns that are still free. The target is the *float* layer's output although the inputs are those
of the quantized prefix, so the weight is first moved to where it reproduces that output best (ridge regression).

The paper takes the Cholesky factor U of the inverse of H, the inputs' Gram matrix. Here H = L L^T itself is factored, its
columns in the reverse of the order of rounding; U is the inverse of L, read backwards. With e the error of all columns
rounded so far, (e L)_j is what the next one, j, has to make up for, so it aims at w_j + (e L)_j / L_jj: the same codes
(Babai's nearest plane, as Chen et al. 2025, arXiv 2507.18553, show) for a quarter of the factorization.
"""

from __future__ import annotations

import torch

from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.quantization.hessian import HessianFactor
from qvlm_export.calibrate.quantization.quantizer import expand_scales, stored_weight_scale

BLOCK_COLUMNS = 128
FAR_COLUMNS = 8 * BLOCK_COLUMNS  # whose debt to the columns beyond them is one product, large enough for `matmul.py`
FRACTIONS = (0.93, 0.86, 0.8)  # of the whole range of a group


def gptq_round(weight: torch.Tensor, rounder: HessianFactor, scale: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """Codes int8 [out, in] for fixed scales. weight: float32 [out, in]; scale as stored.

    Groups keep their scales whatever the order of the columns, so the layout is unchanged. Inside, columns are rows, which
    lie in memory one behind another.
    """
    order, upper = rounder.order, rounder.lower.mT
    steps = scale.float().reshape(len(weight), -1).T.contiguous()  # [groups, out]
    groups = (order // (weight.shape[1] // len(steps))).tolist()
    codes = weight.T[order]  # a column is its weight until it is rounded
    errors = torch.empty_like(codes)
    code = torch.empty_like(codes[0])
    for late in range(len(codes), 0, -FAR_COLUMNS):
        early = max(0, late - FAR_COLUMNS)
        owed = matmul(upper[early:late, late:].float(), errors[late:])  # (e L) of these columns, [columns, out]
        for end in range(late, early, -BLOCK_COLUMNS):
            start = max(early, end - BLOCK_COLUMNS)
            own = owed[start - early : end - early]
            own += matmul(upper[start:end, end:late].float(), errors[end:late])
            near = upper[start:end, start:end].float().T.contiguous()
            # Rows are taken out once: finding one takes as long as an operation on a short one.
            block = [tensor.unbind() for tensor in (codes[start:end], errors[start:end], own, near, near.diagonal())]
            for at, (exact, error, owes, row, pivot) in reversed(list(enumerate(zip(*block, strict=True)))):
                step = steps[groups[start + at]]
                torch.addcdiv(exact, owes, pivot, out=code).div_(step).round_().clamp_(scheme.qmin, scheme.qmax)
                torch.addcmul(exact, code, step, value=-1, out=error)
                exact.copy_(code)
                own[:at].addr_(row[:at], error)
    restored = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    restored[:, order] = codes.T.to(torch.int8)
    return restored


def search_gptq_scale(
    weight: torch.Tensor, gram: torch.Tensor, rounder: HessianFactor, scale: torch.Tensor, scheme: LinearScheme
) -> torch.Tensor:
    """Scales as stored: for each output those of FRACTIONS of the range that leave the least error e H e^T.

    weight: float32 [out, in]; gram: H [in, in]; scale: of the whole range. What clipping costs depends on what the other
    columns can make up for, so every range is rounded in before they are compared. Scales of whole rows (6 and 8 bits) stay.
    """
    if scheme.group_size is None:
        return scale
    whole = scale.float()
    least = _row_errors(weight, gram, gptq_round(weight, rounder, scale, scheme), scale)
    for fraction in FRACTIONS:
        smaller = stored_weight_scale(whole * fraction, scheme)
        errors = _row_errors(weight, gram, gptq_round(weight, rounder, smaller, scheme), smaller)
        scale = torch.where((errors < least)[:, None], smaller, scale)
        least = torch.minimum(errors, least)
    return scale


def _row_errors(weight: torch.Tensor, gram: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    error = weight - codes.float() * expand_scales(scale, weight.shape[1])
    return (matmul(error, gram) * error).sum(1)
