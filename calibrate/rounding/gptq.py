"""GPTQ: rounds a weight column by column for the least output error (Frantar et al. 2022, arXiv 2210.17323, section 3).

The error of each rounded column is compensated by the columns that are not rounded yet. What goes in is a float weight, the
factor of its input Hessian H = X_q X_q^T (tokens as columns, as in the paper) and the scales; what comes out are the codes.
The inputs X_q are those of the quantized model, so the weight is moved by `output_matching.py` first: the target is the
*float* layer's output.

The paper takes the Cholesky factor U of the inverse of H. Here H = L L^T itself is factored, with its columns in the reverse
of the order of rounding; U is the inverse of L, read backwards. With e the error of all columns rounded so far, (e L)_j is
the propagated error that the next column j has to compensate, so its target is w_j + (e L)_j / L_jj. These are the same
codes (Babai's nearest plane, as Chen et al. 2025, arXiv 2507.18553, show) for a quarter of the factorization.
"""

from __future__ import annotations

import torch

from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.quantization.hessian import HessianFactor

BLOCK_COLUMNS = 128
# Lazy batch update: errors are propagated beyond this many columns by one product, large enough for `matmul.py`.
FAR_COLUMNS = 8 * BLOCK_COLUMNS


def gptq_round(weight: torch.Tensor, factor: HessianFactor, scale: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """Codes int8 [out, in] for fixed scales. weight: float32 [out, in]; factor: of H; scale: as stored.

    Groups keep their scales whatever the order of the columns, so the layout of the scales does not change. All matrices are
    transposed inside, so that a column of the weight is contiguous in memory.
    """
    order, upper = factor.order, factor.lower.mT
    steps = scale.float().reshape(len(weight), -1).T.contiguous()  # [groups, out]
    groups = (order // (weight.shape[1] // len(steps))).tolist()
    codes = weight.T[order]  # holds the weights; each column is overwritten by its codes once it is rounded
    errors = torch.empty_like(codes)
    code = torch.empty_like(codes[0])
    for far_end in range(len(codes), 0, -FAR_COLUMNS):
        far_start = max(0, far_end - FAR_COLUMNS)
        propagated = matmul(upper[far_start:far_end, far_end:].float(), errors[far_end:])  # e L, [columns, out]
        for end in range(far_end, far_start, -BLOCK_COLUMNS):
            start = max(far_start, end - BLOCK_COLUMNS)
            block_propagated = propagated[start - far_start : end - far_start]
            block_propagated += matmul(upper[start:end, end:far_end].float(), errors[end:far_end])
            lower = upper[start:end, start:end].float().T.contiguous()
            # Rows are unbound once: indexing one takes as long as an operation on a short one.
            rows = (codes[start:end], errors[start:end], block_propagated, lower, lower.diagonal())
            block = [tensor.unbind() for tensor in rows]
            for at, (exact, error, shift, row, pivot) in reversed(list(enumerate(zip(*block, strict=True)))):
                step = steps[groups[start + at]]
                torch.addcdiv(exact, shift, pivot, out=code).div_(step).round_().clamp_(scheme.qmin, scheme.qmax)
                torch.addcmul(exact, code, step, value=-1, out=error)
                exact.copy_(code)
                block_propagated[:at].addr_(row[:at], error)
    restored = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    restored[:, order] = codes.T.to(torch.int8)
    return restored
