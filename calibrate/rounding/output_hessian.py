"""Output Hessian (Fisher) G = sum g g^T of a linear from its output gradients; sketched by random signs where it is wide.

It tells in which directions errors of a linear's output move the model's output; `kronecker_rounding.py` rounds by it. Up to
SKETCH_ROWS outputs G is stored itself, float32 [out, out]. Beyond, a sketch S is stored, bfloat16 [SKETCH_ROWS, out], with
S^T S equal to G on average (Achlioptas 2003, theorem 1.1). Every function here takes either form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qvlm_export.calibrate.numerics.matmul import gram, matmul
from qvlm_export.calibrate.numerics.threads import one_thread
from qvlm_export.calibrate.quantization.hessian import factor_hessian

DAMPING = 0.1  # of the mean of G's diagonal: ten times that of H, as the gradients come from few samples

SKETCH_ROWS = 2048  # the number of outputs beyond which a sketch of this many rows replaces G


def empty_output_hessian(outputs: int) -> torch.Tensor:
    """A zero to start `add_gradients` from: G, float32 [out, out], or its sketch, bfloat16 [SKETCH_ROWS, out]."""
    if outputs <= SKETCH_ROWS:
        return torch.zeros(outputs, outputs)
    return torch.zeros(SKETCH_ROWS, outputs, dtype=torch.bfloat16)


def add_gradients(output_hessian: torch.Tensor, gradients: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The output Hessian or sketch with more gradients added to it; the argument is not changed.

    gradients: float32 [tokens, out]. generator: draws the signs by which a sketch sums the gradients.
    """
    if len(output_hessian) == output_hessian.shape[1]:
        return output_hessian + gram(gradients).cpu()
    signs = torch.randint(0, 2, (len(output_hessian), len(gradients)), generator=generator) * 2.0 - 1.0
    update = matmul(signs.to(gradients.device), gradients).cpu() / len(output_hessian) ** 0.5
    return (output_hessian.float() + update).bfloat16()


def temper_gradients(gradients: torch.Tensor) -> torch.Tensor:
    """Each token's gradient, float32 [tokens, out], divided by the square root of its norm.

    In the plain sum G a token counts by its squared norm, so a few tokens with large gradients decide the directions of all.
    Tempered, it counts by its norm.
    """
    return gradients / gradients.norm(dim=1, keepdim=True).clamp(min=1e-30).sqrt()


def invert_cholesky(hessian: torch.Tensor) -> torch.Tensor:
    """R, float32 [in, in], with R R^T the inverse of the damped input Hessian, for `leverage_scores`.

    hessian: H, float32 [in, in]. Raises UserError where it is not finite.
    """
    factor = factor_hessian(hessian)
    inverse = torch.empty_like(hessian)
    with one_thread():
        identity = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
        inverse[factor.order] = torch.linalg.solve_triangular(factor.lower, identity, upper=False).T.float()
    return inverse


def leverage_scores(rows: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """The leverage x^T H^-1 x of every row, float32 [tokens].

    rows: float32 [tokens, in]; inverse: the result of `invert_cholesky`.
    """
    return matmul(rows, inverse).square().sum(1)


def scale_output_hessian(output_hessian: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """The output Hessian or sketch of outputs that equalization divided by `factors`, float32 [out].

    Dividing an output by a factor multiplies its gradients by it.
    """
    gradient_factors = factors.to(output_hessian.device)
    if len(output_hessian) == output_hessian.shape[1]:
        return output_hessian * gradient_factors[:, None] * gradient_factors
    return (output_hessian.float() * gradient_factors).bfloat16()


def root_output_importance(output_hessians: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The square root of each output's importance, its entry in the damped diagonal of G: float32 [all outputs].

    Multiplying a weight's rows by it makes squared errors count by importance. Its mean square is 1; it is 1 everywhere if
    all gradients are 0. output_hessians: of the linears that share an input, in the order of their outputs.
    """
    diagonals = [g.diagonal() if len(g) == g.shape[1] else g.float().square().sum(0) for g in output_hessians]
    damped = torch.cat([diagonal + DAMPING * diagonal.mean() for diagonal in diagonals])
    with one_thread():
        mean = damped.mean()
    return (damped / mean if mean > 0 else torch.ones_like(damped)).sqrt().to(device)
