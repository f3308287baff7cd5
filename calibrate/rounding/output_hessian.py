"""calibrate/rounding/output_hessian.py"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.numerics.threads import one_thread
from qvlm_export.calibrate.quantization.hessian import factor_hessian
from qvlm_export.calibrate.quantization.quantizer import squared_sum

DAMPING = 0.1  # of the mean of G's diagonal: its gradients are of few samples

SKETCH_ROWS = 1024  # outputs beyond which a sketch of so many rows is kept of their gradients


def empty_output_hessian(outputs: int) -> torch.Tensor:
    """What `add_gradients` adds to: float32 [out, out], or a sketch, bfloat16 [SKETCHED, out] with S^T S about G."""
    if outputs <= SKETCH_ROWS:
        return torch.zeros(outputs, outputs)
    return torch.zeros(SKETCH_ROWS, outputs, dtype=torch.bfloat16)


def add_gradients(metric: torch.Tensor, gradients: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The metric with more gradients in it. gradients: float32 [tokens, out].

    A sketch holds random sums of the gradients (Achlioptas 2003, theorem 1.1), whose products are G's on average.
    """
    if len(metric) == metric.shape[1]:
        return metric + matmul(gradients.T, gradients).cpu()
    signs = torch.randint(0, 2, (len(metric), len(gradients)), generator=generator) * 2.0 - 1.0
    more = matmul(signs.to(gradients.device), gradients).cpu() / len(metric) ** 0.5
    return (metric.float() + more).bfloat16()


def invert_cholesky(gram: torch.Tensor) -> torch.Tensor:
    """What `leverage_scores` multiplies inputs by, float32 [in, in], from their Gram matrix, float32 [in, in]."""
    rounder = factor_hessian(gram)
    inverse = torch.empty_like(gram)
    with one_thread():
        identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        inverse[rounder.order] = torch.linalg.solve_triangular(rounder.lower, identity, upper=False).T.float()
    return inverse


def leverage_scores(rows: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """x^T H^-1 x of every row, float32 [tokens]. rows: float32 [tokens, in]; inverse: as `invert_cholesky` gives it."""
    return matmul(rows, inverse).square().sum(1)


def scale_output_hessian(metric: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """The metric of outputs that were divided by factors, float32 [out], which multiplies their gradients."""
    own = factors.to(metric.device)
    if len(metric) == metric.shape[1]:
        return metric * own[:, None] * own
    return (metric.float() * own).bfloat16()


def root_output_importance(metrics: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """What an error of each output counts, as factors of its row, float32 [all outputs], mean square 1; all 1 where nothing
    matters. metrics: of linears that share an input, one after another."""
    sizes = [m.diagonal() if len(m) == m.shape[1] else m.float().square().sum(0) for m in metrics]
    damped = torch.cat([size + DAMPING * size.mean() for size in sizes])
    with one_thread():
        mean = damped.mean()
    return (damped / mean if mean > 0 else torch.ones_like(damped)).sqrt().to(device)


def error_directions(metric: torch.Tensor, device: torch.device) -> torch.Tensor:
    """D float32 [out, k] with |e D|^2 what an error e does to the answers, DAMPING of its own size included."""
    kept = metric.to(device).float()
    if len(kept) == kept.shape[1]:
        size = kept.diagonal().mean().clamp(min=1e-30)
        with one_thread():
            return torch.linalg.cholesky(kept / size + DAMPING * torch.eye(len(kept), device=device))
    root = max(squared_sum(kept) / kept.shape[1], 1e-30) ** 0.5
    return torch.cat([kept.T / root, DAMPING**0.5 * torch.eye(kept.shape[1], device=device)], 1)
