"""Codes and scales of a rounded weight, moved on until no single change makes its output error less. torch.

GPTQ decides every column once, with scales that it is given. Here the scales become the best ones for the codes (least
squares), then every code the best one for all others, in turns: coordinate descent on e (H + d I) e^T, e the weight's error,
H the inputs' Gram matrix, d GPTQ's damping. Codes as in QuantEase (Behdin et al. 2023, arXiv 2309.01885, section 3).
No step makes the error more, so what comes out is never worse than what went in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calibrate.gptq import BLOCK_COLUMNS, DAMPING, column_scales
from calibrate.quantize import stored_weight_scale
from calibrate.scheme import LinearScheme


@dataclass(frozen=True)
class Rounded:
    """codes: int8 [out, in]. scale: as stored, float16 [out, groups] or float32 [out]."""

    codes: torch.Tensor
    scale: torch.Tensor
    scheme: LinearScheme


def refine(weight: torch.Tensor, gram: torch.Tensor, rounded: Rounded, sweeps: int) -> Rounded:
    """Better codes and scales for the weight, float32 [out, in]. gram: float32 [in, in]."""
    scale, scheme = rounded.scale, rounded.scheme
    metric = gram.clone()
    metric.diagonal().add_(DAMPING * float(gram.diagonal().double().mean().clamp(min=1e-12)))
    values = rounded.codes.float()
    # Half of the error's negative gradient by the rounded weight, float32 [out, in]; every change is brought into it.
    pull = (weight - values * column_scales(scale, weight.shape[1])) @ metric
    for _ in range(sweeps):
        scale = _fit_scales_(pull, metric, values, scale, scheme)
        _descend_(pull, metric, values, scale, scheme)
    return Rounded(values.to(torch.int8), scale, scheme)


def _fit_scales_(
    pull: torch.Tensor, metric: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, scheme: LinearScheme
) -> torch.Tensor:
    """Each group's best scale for its codes, the others as they are; where rounding it to float16 is worse, it stays."""
    size = scheme.group_size or codes.shape[1]
    wide = scale.float().reshape(len(codes), -1).clone()
    for group, start in enumerate(range(0, codes.shape[1], size)):
        part = slice(start, start + size)
        seen = codes[:, part] @ metric[part]  # [out, in]
        curve = (seen[:, part] * codes[:, part]).sum(1)
        slope = (codes[:, part] * pull[:, part]).sum(1)
        best = wide[:, group] + slope / curve.clamp(min=1e-30)
        moved = stored_weight_scale(best[:, None], scheme).float().reshape(-1) - wide[:, group]
        # The error changes by moved * (moved * curve - 2 slope).
        better = (curve > 0) & (best > 0) & (moved * (moved * curve - 2 * slope) < 0)
        moved = torch.where(better, moved, torch.zeros_like(moved))
        wide[:, group] += moved
        pull -= moved[:, None] * seen
    return stored_weight_scale(wide, scheme)


def _descend_(
    pull: torch.Tensor, metric: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, scheme: LinearScheme
) -> None:
    """One sweep over all columns, in place."""
    steps, diagonal = column_scales(scale, codes.shape[1]), metric.diagonal()
    for start in range(0, codes.shape[1], BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, codes.shape[1])
        near, before = pull[:, start:end].clone(), codes[:, start:end].clone()
        for column in range(start, end):
            step = steps[:, column]
            wanted = codes[:, column] + near[:, column - start] / (diagonal[column] * step)
            new = wanted.round_().clamp_(scheme.qmin, scheme.qmax)
            near -= ((new - codes[:, column]) * step)[:, None] * metric[column, start:end]
            codes[:, column] = new
        pull -= ((codes[:, start:end] - before) * steps[:, start:end]) @ metric[start:end]
