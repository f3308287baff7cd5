"""Rounding a weight so that its output error is least, not its own error. torch.

GPTQ (Frantar et al. 2022, arXiv 2210.17323, section 3): columns are rounded one after another, and the error of each is
made up for by the columns that are still free. The target is the *float* layer's output although the inputs are those
of the quantized prefix, so the weight is first moved to where it reproduces that output best (ridge regression).
Letters as in the paper: H is the Gram matrix of the inputs, U the upper Cholesky factor of its inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calibrate.scheme import LinearScheme
from calibrate.threads import one_thread

BLOCK_COLUMNS = 128
DAMPING = 0.01  # of the mean of H's diagonal, as in the paper
_FILLED = 256  # rows copied at a time


def aim_at_float(weight: torch.Tensor, gram: torch.Tensor, pulled: torch.Tensor, ridge: float) -> torch.Tensor:
    """The weight that best turns quantized inputs into the float layer's output, held back towards `weight`.

    Minimises |W X - V Xq|^2 + ridge * mean(diag H) |V - W|^2 over V. gram: Xq Xq^T [in, in]; pulled: W X Xq^T [out, in].
    """
    held = ridge * float(gram.diagonal().mean().clamp(min=1e-12))
    system = gram.clone().mT  # symmetric, and its columns lie one behind another, so that LAPACK needs no copy
    system.diagonal().add_(held)
    # V system = W X Xq^T + held W, solved from the right.
    with one_thread():
        torch.linalg.cholesky(system, out=system)
        return torch.cholesky_solve((pulled + held * weight).mT, system).mT.contiguous()


@dataclass(frozen=True)
class Rounder:
    """What GPTQ needs of a Gram matrix, for all linears that share the input.

    order: columns by decreasing input energy (act-order); upper: U float32 [in, in], in that order.
    """

    order: torch.Tensor
    upper: torch.Tensor


def make_rounder(gram: torch.Tensor) -> Rounder:
    """gram: float32 [in, in]."""
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    with one_thread():
        return Rounder(order, _inverse_factor(gram, order))


def gptq_round(weight: torch.Tensor, rounder: Rounder, scale: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
    """Codes int8 [out, in] for fixed scales. weight: float32 [out, in]; scale as stored.

    Groups keep their scales whatever the order of the columns, so the layout is unchanged.
    """
    order, upper = rounder.order, rounder.upper
    steps = column_scales(scale, weight.shape[1])[:, order]
    left = weight[:, order].clone()
    codes = torch.empty_like(left)
    for start in range(0, left.shape[1], BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, left.shape[1])
        errors = torch.zeros(left.shape[0], end - start, device=left.device)
        for column in range(start, end):
            step = steps[:, column]
            codes[:, column] = (left[:, column] / step).round_().clamp_(scheme.qmin, scheme.qmax)
            error = (left[:, column] - codes[:, column] * step) / upper[column, column]
            left[:, column:end] -= error[:, None] * upper[column, column:end]
            errors[:, column - start] = error
        left[:, end:] -= errors @ upper[start:end, end:]
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return restored.to(torch.int8)


def column_scales(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """Scales [out] or [out, groups] spread to float32 [out, columns]."""
    wide = scale.float().reshape(scale.shape[0], -1)
    return wide.repeat_interleave(columns // wide.shape[1], dim=1)


def remaining_energy(gram: torch.Tensor) -> torch.Tensor:
    """What rounding each column costs for each squared step once GPTQ has made up for it: 1 / U_jj^2, float32 [in].

    With the columns turned around the damped H is R R^T, R upper, and U is the inverse of R: no inverse is needed.
    """
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    backwards = order.flip(0)
    damping = DAMPING * float(gram.diagonal()[order].double().mean().clamp(min=1e-12))
    failed = torch.ones((), dtype=torch.int32, device=gram.device)
    wide = torch.empty(gram.shape, dtype=torch.float64, device=gram.device).mT
    with one_thread():
        while int(failed):
            _fill_(wide, gram, backwards, damping)
            torch.linalg.cholesky_ex(wide, out=(wide, failed))
            damping *= 10
    left = torch.empty(len(gram), device=gram.device)
    left[backwards] = wide.diagonal().square().float()
    return left


def _inverse_factor(gram: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the damped Gram matrix's inverse, float32 [in, in]; damped more until it exists.

    In one float64 matrix, which is most of what a wide linear takes in memory: its columns lie one behind another as LAPACK
    wants them, or every step would make a copy.
    """
    damping = DAMPING * float(gram.diagonal()[order].double().mean().clamp(min=1e-12))
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    wide = torch.empty(gram.shape, dtype=torch.float64, device=gram.device).mT
    while True:
        _fill_(wide, gram, order, damping)
        torch.linalg.cholesky_ex(wide, out=(wide, failed))
        if not int(failed):
            torch.cholesky_inverse(wide, out=wide)
            torch.linalg.cholesky_ex(wide, out=(wide, failed))
            if not int(failed):
                return wide.mT.float()  # of the lower factor L, H^-1 = L L^T
        damping *= 10


def _fill_(wide: torch.Tensor, gram: torch.Tensor, order: torch.Tensor, damping: float) -> None:
    """The damped Gram matrix in another order, some rows at a time. wide: float64, column by column."""
    for start in range(0, len(gram), _FILLED):
        rows = order[start : start + _FILLED]
        wide.mT[start : start + _FILLED] = gram[rows][:, order]  # symmetric: its rows are its columns
    wide.diagonal().add_(damping)
