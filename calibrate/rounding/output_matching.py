"""calibrate/rounding/output_matching.py"""

from __future__ import annotations

import torch

from qvlm_export.calibrate.numerics.cholesky import cholesky_
from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.numerics.threads import map_on_threads

SOLVED_ROWS = 1024  # outputs whose weights are aimed at a time, by a thread of their own


def match_outputs(weight: torch.Tensor, gram: torch.Tensor, pulled: torch.Tensor, ridge: float) -> torch.Tensor:
    """The weight that best turns quantized inputs into the float layer's output, held back towards `weight`.

    Minimises |W X - V Xq|^2 + ridge * mean(diag H) |V - W|^2 over V. gram: Xq Xq^T [in, in]; pulled: W X Xq^T [out, in].
    """
    held = ridge * _mean_energy(gram)
    # V (H + held) = W X Xq^T + held W, solved from the right.
    return _solved(gram.clone(), held, pulled + held * weight)


def match_outputs_by_tokens(
    weight: torch.Tensor, wanted: torch.Tensor, seen: torch.Tensor, gram: torch.Tensor, ridge: float
) -> torch.Tensor:
    """The same as `match_outputs`, from a system with a row for each token, where they are fewer than inputs.

    V = W + W (X - Xq)^T (Xq Xq^T + held)^-1 Xq, by the push-through identity. wanted: X, seen: Xq, float32 [tokens, in],
    rows times the root of what each counts; gram: Xq^T Xq [in, in].
    """
    apart, system, held = (wanted - seen).T, matmul(seen, seen.T), ridge * _mean_energy(gram)
    if len(weight) > weight.shape[1]:  # fewer rows to solve for
        return weight + matmul(weight, matmul(_solved(system, held, apart), seen))
    return weight + matmul(_solved(system, held, matmul(weight, apart)), seen)


def _mean_energy(gram: torch.Tensor) -> float:
    return float(gram.diagonal().mean().clamp(min=1e-12))


def _solved(system: torch.Tensor, held: float, rows: torch.Tensor) -> torch.Tensor:
    """rows (system + held)^-1, some rows a thread. system: symmetric, overwritten."""
    factor = system.mT  # its columns lie one behind another, so that LAPACK needs no copy
    factor.diagonal().add_(held)
    if not cholesky_(factor):
        raise RuntimeError("a damped Gram matrix is not positive definite")
    return torch.cat(map_on_threads(lambda part: torch.cholesky_solve(part.mT, factor).mT, rows.split(SOLVED_ROWS)))
