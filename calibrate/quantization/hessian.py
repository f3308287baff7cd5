"""Input Hessian H = X X^T of GPTQ: its damped Cholesky factor (Frantar et al. 2022, arXiv 2210.17323, section 3).

H is the Gram matrix of a linear's inputs X [in, tokens], half the second derivative of the squared output error by a row of
the weight. The same factorization serves the output Hessian in `kronecker_rounding.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.numerics.cholesky import cholesky_

DAMPING = 0.01  # of the mean of H's diagonal, as in the paper

_COPIED_ROWS = 256  # rows of H copied at a time


@dataclass(frozen=True)
class HessianFactor:
    """The Cholesky factor of a damped Hessian, H = L L^T, for all linears that share the input.

    order: int64 [in], columns by increasing input energy (act-order); they are rounded from the last to the first. lower: L,
    float64 [in, in], in that order and column-major in memory. damping: what was added to the diagonal.
    """

    order: torch.Tensor
    lower: torch.Tensor
    damping: float

    def residual_energy(self) -> torch.Tensor:
        """L_jj^2, float32 [in]: the output error of a unit error in each column after GPTQ's compensation."""
        energy = torch.empty(len(self.order), device=self.order.device)
        energy[self.order] = self.lower.diagonal().square().float()
        return energy


def factor_hessian(hessian: torch.Tensor, damping: float = DAMPING, order: torch.Tensor | None = None) -> HessianFactor:
    """The factor of a Hessian damped by `damping` times its mean diagonal, ten times more until it can be factored.

    hessian: float32 [in, in]. order: int64 [in], of the columns; None for act-order. Raises UserError if its diagonal is not
    finite, which no damping mends.

    Only one float64 matrix is made, as it is most of the memory that a wide linear takes. It is column-major, so that LAPACK
    needs no copy.
    """
    if order is None:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True).flip(0)
    mean_diagonal = float(hessian.diagonal()[order].double().mean().clamp(min=1e-12))
    if not math.isfinite(mean_diagonal):
        raise UserError(
            f"second moments of {len(hessian)} channels are not finite: their values are too large to calibrate on"
        )
    damping *= mean_diagonal
    lower = torch.empty(hessian.shape, dtype=torch.float64, device=hessian.device).mT
    _fill_(lower, hessian, order, damping)
    while not cholesky_(lower):
        damping *= 10
        _fill_(lower, hessian, order, damping)
    return HessianFactor(order, lower, damping)


def _fill_(target: torch.Tensor, hessian: torch.Tensor, order: torch.Tensor, damping: float) -> None:
    """Writes the damped Hessian in another order, some rows at a time. target: float64 [in, in], column-major."""
    for start in range(0, len(hessian), _COPIED_ROWS):
        rows = order[start : start + _COPIED_ROWS]
        target.mT[start : start + _COPIED_ROWS] = hessian[rows][:, order]  # symmetric: its rows are its columns
    target.diagonal().add_(damping)
