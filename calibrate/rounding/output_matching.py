"""Output matching: ridge regression moves a weight so that quantized inputs reproduce the float layer's output.

What goes in is the float weight W and the layer's inputs: X in the float model, and X_q in the quantized one, with the
errors of the already quantized preceding blocks. What comes out is the weight V that is rounded instead of W. The ridge
draws V towards W, so that V does not fit the calibration set too closely.

Where the output is added to the residual stream, the quantized stream already differs from the float one. That gap can be
matched, too: V X_q then aims at W X plus the gap, so that errors of preceding blocks do not add up.
"""

from __future__ import annotations

import torch

from qvlm_export.calibrate.numerics.cholesky import cholesky_
from qvlm_export.calibrate.numerics.matmul import gram, matmul
from qvlm_export.calibrate.numerics.threads import map_on_threads

SOLVED_ROWS = 1024  # rows of the right-hand side that one thread solves for at a time


def match_outputs(weight: torch.Tensor, hessian: torch.Tensor, cross_term: torch.Tensor, ridge: float) -> torch.Tensor:
    """The weight V, float32 [out, in], that minimizes |W X - V X_q|^2 + ridge * mean(diag H) |V - W|^2.

    Tokens are the columns of X and X_q here. weight: W, float32 [out, in]; hessian: H = X_q X_q^T [in, in]; cross_term:
    W X X_q^T [out, in]. Raises RuntimeError if the regularized Hessian is not positive definite.
    """
    regularization = ridge * _mean_diagonal(hessian)
    # V (H + regularization I) = W X X_q^T + regularization W, solved from the right.
    return _solve(hessian.clone(), regularization, cross_term + regularization * weight)


def match_outputs_by_tokens(
    weight: torch.Tensor,
    float_inputs: torch.Tensor,
    quantized_inputs: torch.Tensor,
    hessian: torch.Tensor,
    ridge: float,
    *,
    residual_gap: torch.Tensor | None = None,
) -> torch.Tensor:
    """The result of `match_outputs`, from a [tokens, tokens] system, which is smaller where tokens are fewer than inputs.

    V = W + W (X - X_q)^T (X_q X_q^T + regularization I)^-1 X_q by the push-through identity, tokens being the rows of X and
    X_q here. float_inputs: X, quantized_inputs: X_q, float32 [tokens, in], every row multiplied by the square root of its
    token's weight; hessian: X_q^T X_q [in, in]. residual_gap: what is matched besides, float32 [tokens, out], its rows
    multiplied alike; None for nothing.
    """
    gap, system = (float_inputs - quantized_inputs).T, gram(quantized_inputs.T)
    regularization = ridge * _mean_diagonal(hessian)
    if residual_gap is None and len(weight) > weight.shape[1]:  # the identity in place of W has fewer rows to solve for
        return weight + matmul(weight, matmul(_solve(system, regularization, gap), quantized_inputs))
    output_gap = matmul(weight, gap)
    if residual_gap is not None:
        output_gap += residual_gap.T
    return weight + matmul(_solve(system, regularization, output_gap), quantized_inputs)


def _mean_diagonal(hessian: torch.Tensor) -> float:
    return float(hessian.diagonal().mean().clamp(min=1e-12))


def _solve(system: torch.Tensor, regularization: float, rows: torch.Tensor) -> torch.Tensor:
    """rows (system + regularization I)^-1, SOLVED_ROWS rows on each thread. system: symmetric, is overwritten."""
    factor = system.mT  # column-major, so that LAPACK needs no copy
    factor.diagonal().add_(regularization)
    if not cholesky_(factor):
        raise RuntimeError("the regularized Hessian is not positive definite")
    return torch.cat(map_on_threads(lambda part: torch.cholesky_solve(part.mT, factor).mT, rows.split(SOLVED_ROWS)))
