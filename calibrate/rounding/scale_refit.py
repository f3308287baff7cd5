"""Scales by least squares: those with the least output error for codes that rounding has chosen.

Rounding chooses codes for fixed scales. For fixed codes the output error e H e^T of a row is quadratic in the scales of its
groups, so the best ones solve a small linear system. With Q the codes of the groups, each group in a row of its own and zero
elsewhere, the error is e = w - s Q, and the scales solve (Q H Q^T) s = Q H w^T.
"""

from __future__ import annotations

import torch

from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.numerics.threads import map_on_threads
from qvlm_export.calibrate.quantization.quantizer import stored_weight_scale

MAX_CHANGE = 0.25  # of a scale; a group of few codes may want more, but not by what the samples say
_STAY = 1e-3  # of the mean diagonal of Q H Q^T, by which scales are held where they are: codes may all be 0
_ROWS = 512  # fitted at a time
_SOLVED_ROWS = 128  # whose systems one thread solves


def refit_scales(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    scheme: LinearScheme,
    *,
    damping: float = 0.0,
) -> torch.Tensor:
    """Scales, as stored, with the least error e (H + damping I) e^T for these codes, of each row on its own.

    weight: float32 [out, in] that was rounded; hessian: H, float32 [in, in]; codes: int8 [out, in]; scale: with which they
    were chosen, as stored; damping: in the units of H.
    """
    before = scale.float().reshape(len(scale), -1)
    parts = zip(weight.split(_ROWS), codes.split(_ROWS), before.split(_ROWS), strict=True)
    fitted = torch.cat([_fit_rows(rows, hessian, part, old, damping) for rows, part, old in parts])
    return stored_weight_scale(fitted.clamp(before * (1 - MAX_CHANGE), before * (1 + MAX_CHANGE)), scheme)


def _fit_rows(
    weight: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, before: torch.Tensor, damping: float
) -> torch.Tensor:
    """Scales, float32 [rows, groups], that solve the systems of these rows."""
    rows, groups = before.shape
    size = weight.shape[1] // groups
    grouped = codes.float().view(rows, groups, size)
    right = (matmul(weight, hessian).add_(weight, alpha=damping).view(rows, groups, size) * grouped).sum(-1)
    system = torch.empty(rows, groups, groups, device=weight.device)
    for group in range(groups):
        products = matmul(grouped[:, group], hessian[group * size : (group + 1) * size])
        system[:, group] = (products.view(rows, groups, size) * grouped).sum(-1)
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal.add_(grouped.square().sum(-1), alpha=damping)
    held = _STAY * diagonal.mean(1, keepdim=True).clamp(min=1e-30)
    diagonal.add_(held)
    right += held * before
    parts = list(zip(system.split(_SOLVED_ROWS), right.split(_SOLVED_ROWS), strict=True))
    return torch.cat(map_on_threads(lambda part: torch.linalg.solve(part[0].double(), part[1].double()).float(), parts))
