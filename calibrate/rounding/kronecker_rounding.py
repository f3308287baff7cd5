"""Adaptive rounding under a Kronecker-factored Hessian (K-FAC; YAQA, Tseng et al. 2025, arXiv 2505.22988).

GPTQ measures the error E [out, in] of a weight by the inputs alone: e H e^T for each output, e being its row of E. Errors of
different outputs can compensate one another as well, because most directions of a linear's output hardly move the logits.
Let g be the gradients of the model's output with respect to the linear's output at every token, and G = sum g g^T the output
Hessian (`output_hessian.py`). All codes of the linear are then chosen to minimize

    tr(E^T G E H),

the Kronecker form of the model's second derivative (Martens and Grosse 2015, section 3), which YAQA uses to round towards a
model's output. With H = L L^T and G = M M^T, columns and rows in the reverse of the order of rounding (as in `gptq.py`), the
error is |M^T E L|^2. The outputs are rounded in SLABS slabs. The error that the slabs rounded before leave is compensated by
moving the next one, slab b by M_bb^-T M_rb^T E_r, r being the outputs rounded before it. GPTQ then rounds the moved slab.

Inside a slab outputs do not compensate one another. To lose little by that, outputs are in random order: neighbours, such as
the channels of one head, have the most in common. Slabs of one output would be rounded as by Babai's nearest plane.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.matmul import gram, matmul
from qvlm_export.calibrate.numerics.threads import one_thread
from qvlm_export.calibrate.quantization.hessian import HessianFactor, factor_hessian
from qvlm_export.calibrate.quantization.quantizer import expand_scales
from qvlm_export.calibrate.rounding.gptq import gptq_round
from qvlm_export.calibrate.rounding.output_hessian import DAMPING
from qvlm_export.calibrate.rounding.scale_refit import refit_scales

SLABS = 16  # into which the outputs of each linear are divided


def factor_output_hessian(output_hessian: torch.Tensor, device: torch.device, damping: float = DAMPING) -> HessianFactor:
    """The rounding order of the outputs, which is random, and the factor M of the damped G, scaled to a mean diagonal of 1.

    output_hessian: G or a sketch of it, as `empty_output_hessian` lays it out. device: where to compute the factor.
    damping: relative to the mean of G's diagonal.
    """
    stored = output_hessian.to(device).float()
    full = stored if len(stored) == stored.shape[1] else gram(stored)
    mean_diagonal = full.diagonal().mean().clamp(min=1e-30)
    order = torch.randperm(len(full), generator=torch.Generator().manual_seed(0)).to(device)
    return factor_hessian(full / mean_diagonal, damping, order)


def kronecker_round(
    weight: torch.Tensor,
    input_factor: HessianFactor,
    output_factors: Sequence[HessianFactor],
    scale: torch.Tensor,
    scheme: LinearScheme,
    *,
    hessian: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [out, in] and scales as stored, of one linear or of several that share an input.

    weight: float32 [out, in], the outputs of all linears; input_factor: of H; output_factors: of G of each linear, in the
    order of their outputs; scale: as stored; hessian: H, by which the scales of each slab are fitted to its codes before the
    next one is moved, None for scales as they are.
    """
    scale = scale.clone()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    errors = torch.zeros_like(weight)  # E, of the outputs rounded so far
    firsts = [0]
    for factor in output_factors:
        firsts.append(firsts[-1] + len(factor.order))
    for slab in reversed(range(SLABS)):
        rows, targets = [], []
        for factor, first in zip(output_factors, firsts, strict=False):
            count = len(factor.order)
            start, stop = slab * count // SLABS, (slab + 1) * count // SLABS
            if start == stop:
                continue
            rows.append(first + factor.order[start:stop])
            targets.append(weight[rows[-1]])
            if stop < count:
                targets[-1] += matmul(_feedback(factor.lower, start, stop), errors[first + factor.order[stop:]])
        if not rows:
            continue
        chosen, target = torch.cat(rows), torch.cat(targets)
        codes[chosen] = gptq_round(target, input_factor, scale[chosen], scheme)
        if hessian is not None:
            damping = input_factor.damping
            scale[chosen] = refit_scales(target, hessian, codes[chosen], scale[chosen], scheme, damping=damping)
        errors[chosen] = weight[chosen] - codes[chosen].float() * expand_scales(scale[chosen], weight.shape[1])
    return codes, scale


def _feedback(lower: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """M_bb^-T M_rb^T, float32 [stop - start, rest]: how errors of the outputs from `stop` on move those of the slab."""
    with one_thread():
        return torch.linalg.solve_triangular(lower[start:stop, start:stop].T, lower[stop:, start:stop].T, upper=True).float()
