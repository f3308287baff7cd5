"""calibrate/quantization/hessian.py"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.numerics.cholesky import cholesky_

DAMPING = 0.01  # of the mean of H's diagonal, as in the paper

_FILLED = 256  # rows copied at a time


@dataclass(frozen=True)
class HessianFactor:
    """What GPTQ needs of a Gram matrix, for all linears that share the input.

    order: columns by increasing input energy; they are rounded from the last to the first (act-order). lower: L float64
    [in, in] in that order; its columns lie one behind another.
    """

    order: torch.Tensor
    lower: torch.Tensor


def factor_hessian(gram: torch.Tensor, damping: float = DAMPING) -> HessianFactor:
    """gram: float32 [in, in]; damped by so much of its mean diagonal, and more until it can be factored.

    Raises UserError where it is not finite, as no damping mends that.

    One float64 matrix, which is most of what a wide linear takes in memory: its columns lie one behind another as LAPACK
    wants them, or it would make a copy.
    """
    order = torch.argsort(gram.diagonal(), descending=True, stable=True).flip(0)
    size = float(gram.diagonal()[order].double().mean().clamp(min=1e-12))
    if not math.isfinite(size):
        raise UserError(f"second moments of {len(gram)} channels are not finite: their values are too large to calibrate on")
    damping *= size
    lower = torch.empty(gram.shape, dtype=torch.float64, device=gram.device).mT
    _fill_(lower, gram, order, damping)
    while not cholesky_(lower):
        damping *= 10
        _fill_(lower, gram, order, damping)
    return HessianFactor(order, lower)


def gptq_residual_energy(gram: torch.Tensor) -> torch.Tensor:
    """What rounding each column costs for each squared step once GPTQ has made up for it: L_jj^2, float32 [in]."""
    rounder = factor_hessian(gram)
    left = torch.empty(len(gram), device=gram.device)
    left[rounder.order] = rounder.lower.diagonal().square().float()
    return left


def _fill_(wide: torch.Tensor, gram: torch.Tensor, order: torch.Tensor, damping: float) -> None:
    """The damped Gram matrix in another order, some rows at a time. wide: float64, column by column."""
    for start in range(0, len(gram), _FILLED):
        rows = order[start : start + _FILLED]
        wide.mT[start : start + _FILLED] = gram[rows][:, order]  # symmetric: its rows are its columns
    wide.diagonal().add_(damping)
