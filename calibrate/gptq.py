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

import math
from dataclasses import dataclass

import torch

from calibrate.errors import UserError
from calibrate.factor import cholesky_
from calibrate.products import product
from calibrate.quantize import stored_weight_scale
from calibrate.scheme import LinearScheme
from calibrate.threads import each_on_one_thread

BLOCK_COLUMNS = 128
FAR_COLUMNS = 8 * BLOCK_COLUMNS  # whose debt to the columns beyond them is one product, large enough for `products.py`
SOLVED = 1024  # outputs whose weights are aimed at a time, by a thread of their own
DAMPING = 0.01  # of the mean of H's diagonal, as in the paper
FRACTIONS = (0.93, 0.86, 0.8)  # of the whole range of a group
_FILLED = 256  # rows copied at a time


def aim_at_float(weight: torch.Tensor, gram: torch.Tensor, pulled: torch.Tensor, ridge: float) -> torch.Tensor:
    """The weight that best turns quantized inputs into the float layer's output, held back towards `weight`.

    Minimises |W X - V Xq|^2 + ridge * mean(diag H) |V - W|^2 over V. gram: Xq Xq^T [in, in]; pulled: W X Xq^T [out, in].
    """
    held = ridge * _mean_energy(gram)
    # V (H + held) = W X Xq^T + held W, solved from the right.
    return _solved(gram.clone(), held, pulled + held * weight)


def aim_by_tokens(
    weight: torch.Tensor, wanted: torch.Tensor, seen: torch.Tensor, gram: torch.Tensor, ridge: float
) -> torch.Tensor:
    """The same as `aim_at_float`, from a system with a row for each token, where they are fewer than inputs.

    V = W + W (X - Xq)^T (Xq Xq^T + held)^-1 Xq, by the push-through identity. wanted: X, seen: Xq, float32 [tokens, in],
    rows times the root of what each counts; gram: Xq^T Xq [in, in].
    """
    apart, system, held = (wanted - seen).T, product(seen, seen.T), ridge * _mean_energy(gram)
    if len(weight) > weight.shape[1]:  # fewer rows to solve for
        return weight + product(weight, product(_solved(system, held, apart), seen))
    return weight + product(_solved(system, held, product(weight, apart)), seen)


def _mean_energy(gram: torch.Tensor) -> float:
    return float(gram.diagonal().mean().clamp(min=1e-12))


def _solved(system: torch.Tensor, held: float, rows: torch.Tensor) -> torch.Tensor:
    """rows (system + held)^-1, some rows a thread. system: symmetric, overwritten."""
    factor = system.mT  # its columns lie one behind another, so that LAPACK needs no copy
    factor.diagonal().add_(held)
    if not cholesky_(factor):
        raise RuntimeError("a damped Gram matrix is not positive definite")
    return torch.cat(each_on_one_thread(lambda part: torch.cholesky_solve(part.mT, factor).mT, rows.split(SOLVED)))


@dataclass(frozen=True)
class Rounder:
    """What GPTQ needs of a Gram matrix, for all linears that share the input.

    order: columns by increasing input energy; they are rounded from the last to the first (act-order). lower: L float64
    [in, in] in that order; its columns lie one behind another.
    """

    order: torch.Tensor
    lower: torch.Tensor


def make_rounder(gram: torch.Tensor, damping: float = DAMPING) -> Rounder:
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
    return Rounder(order, lower)


def gptq_round(weight: torch.Tensor, rounder: Rounder, scale: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
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
        owed = product(upper[early:late, late:].float(), errors[late:])  # (e L) of these columns, [columns, out]
        for end in range(late, early, -BLOCK_COLUMNS):
            start = max(early, end - BLOCK_COLUMNS)
            own = owed[start - early : end - early]
            own += product(upper[start:end, end:late].float(), errors[end:late])
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


def search_rounded_scale(
    weight: torch.Tensor, gram: torch.Tensor, rounder: Rounder, scale: torch.Tensor, scheme: LinearScheme
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
    error = weight - codes.float() * column_scales(scale, weight.shape[1])
    return (product(error, gram) * error).sum(1)


def column_scales(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """Scales [out] or [out, groups] spread to float32 [out, columns]."""
    wide = scale.float().reshape(scale.shape[0], -1)
    return wide.repeat_interleave(columns // wide.shape[1], dim=1)


def remaining_energy(gram: torch.Tensor) -> torch.Tensor:
    """What rounding each column costs for each squared step once GPTQ has made up for it: L_jj^2, float32 [in]."""
    rounder = make_rounder(gram)
    left = torch.empty(len(gram), device=gram.device)
    left[rounder.order] = rounder.lower.diagonal().square().float()
    return left


def _fill_(wide: torch.Tensor, gram: torch.Tensor, order: torch.Tensor, damping: float) -> None:
    """The damped Gram matrix in another order, some rows at a time. wide: float64, column by column."""
    for start in range(0, len(gram), _FILLED):
        rows = order[start : start + _FILLED]
        wide.mT[start : start + _FILLED] = gram[rows][:, order]  # symmetric: its rows are its columns
    wide.diagonal().add_(damping)
