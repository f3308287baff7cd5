"""Adaptive rounding under a Kronecker-factored Hessian (K-FAC; YAQA, Tseng et al. 2025, arXiv 2505.22988).

GPTQ measures the error E [out, in] of a weight by the inputs alone: e H e^T for each output, e being its row of E. Errors of
different outputs can compensate one another as well, because most directions of a linear's output hardly move the logits.
Let g be the gradients of the answer tokens' logits with respect to the linear's output at every token, and G = sum l g g^T
the output Hessian (`output_hessian.py`). All codes of the linear are then chosen to minimize

    tr(E^T G E H),

the Kronecker form of the model's second derivative (Martens and Grosse 2015, section 3), which YAQA uses to round towards a
model's output. With H = L L^T and G = M M^T, columns and rows in the reverse of the order of rounding (as in `gptq.py`),
the error is |M^T E L|^2. Entry (i, j) of that matrix depends only on outputs from i on and columns from j on, which are
rounded before it, so choosing E_ij to minimize it is Babai's nearest plane once more. Entries on an anti-diagonal do not
depend on one another and are rounded together.

The weight l of a token is the leverage x^T H^-1 x of its input. Rounding leaves E L about equally large in all directions,
so E x is large at a token whose input resembles few others, and small at the many tokens that resemble one another.
"""

from __future__ import annotations

import torch
from torch import nn

from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.quantization.hessian import HessianFactor, factor_hessian
from qvlm_export.calibrate.quantization.quantizer import expand_scales
from qvlm_export.calibrate.rounding.output_hessian import DAMPING

BLOCK = 128  # rows and columns of a block; inside it errors spread entry by entry, between blocks by matrix products


def factor_output_hessian(output_hessian: torch.Tensor, device: torch.device) -> HessianFactor:
    """The rounding order of the outputs and the factor M of the damped G, scaled to a mean diagonal of 1.

    output_hessian: G or a sketch of it, as `empty_output_hessian` lays it out. device: where to compute the factor.
    """
    stored = output_hessian.to(device).float()
    full = stored if len(stored) == stored.shape[1] else matmul(stored.T, stored)
    mean_diagonal = full.diagonal().mean().clamp(min=1e-30)
    return factor_hessian(full / mean_diagonal, DAMPING)


def kronecker_round(
    weight: torch.Tensor,
    input_factor: HessianFactor,
    output_factor: HessianFactor,
    scale: torch.Tensor,
    scheme: LinearScheme,
) -> torch.Tensor:
    """Codes int8 [out, in] for fixed scales.

    weight: float32 [out, in]; input_factor: of H; output_factor: of G; scale: as stored.

    Blocks on an anti-diagonal of the grid of blocks do not depend on one another either, and are rounded as one batch.
    """
    (out, into), size = weight.shape, BLOCK
    # Padded in front, where rounding ends, to whole blocks: nothing depends on the padding.
    height, width = -(-out // size) * size, -(-into // size) * size
    l_factor, m_factor = _PaddedFactor(input_factor.lower, width - into), _PaddedFactor(output_factor.lower, height - out)
    exact, steps = (weight.new_full((height, width), fill) for fill in (0.0, 1.0))
    exact[height - out :, width - into :] = weight[output_factor.order][:, input_factor.order]
    steps[height - out :, width - into :] = expand_scales(scale, into)[output_factor.order][:, input_factor.order]
    errors, el = torch.zeros_like(exact), torch.zeros_like(exact)  # E, and E L as far as it is known
    for diagonal in range(height // size + width // size - 2, -1, -1):
        block_rows = range(max(0, diagonal - width // size + 1), min(diagonal, height // size - 1) + 1)
        blocks = [
            (slice(n * size, (n + 1) * size), slice((diagonal - n) * size, (diagonal - n + 1) * size)) for n in block_rows
        ]
        for rows, columns in blocks:
            el[rows, columns] = matmul(errors[rows, columns.stop :], l_factor.below(columns))
        batch = _BlockBatch(
            torch.stack([exact[block] for block in blocks]),
            torch.stack([steps[block] for block in blocks]),
            torch.stack([l_factor.square(columns) for _, columns in blocks]),
            torch.stack([m_factor.square(rows) for rows, _ in blocks]),
            scheme,
        )
        mel = torch.stack([matmul(m_factor.below(rows).T, el[rows.stop :, columns]) for rows, columns in blocks])  # M^T E L
        rounded = batch.round(torch.stack([el[block] for block in blocks]), mel)
        for block, block_errors, block_el in zip(blocks, *rounded, strict=True):
            errors[block], el[block] = block_errors, block_el
    codes = ((exact - errors) / steps).round_()[height - out :, width - into :].to(torch.int8)
    restored = torch.empty_like(codes)
    restored[output_factor.order[:, None], input_factor.order] = codes
    return restored


class _PaddedFactor:
    """Float32 blocks of a lower triangular factor, padded to whole blocks by `padding` rows and columns in front."""

    def __init__(self, lower: torch.Tensor, padding: int) -> None:
        self._lower, self._padding = lower, padding

    def square(self, columns: slice) -> torch.Tensor:
        """The diagonal block of `columns`, float32 [size, size]; the identity where it is padding."""
        block = torch.eye(columns.stop - columns.start, device=self._lower.device)
        start = max(columns.start, self._padding)
        inside = slice(start - self._padding, columns.stop - self._padding)
        block[start - columns.start :, start - columns.start :] = self._lower[inside, inside].float()
        return block

    def below(self, columns: slice) -> torch.Tensor:
        """All rows below the diagonal block of `columns`, float32 [rows, size]; 0 in columns that are padding."""
        start = max(columns.start, self._padding)
        rows = self._lower[columns.stop - self._padding :, start - self._padding : columns.stop - self._padding].float()
        return nn.functional.pad(rows, (start - columns.start, 0))


class _BlockBatch:
    """Blocks [n, rows, columns] that are rounded at the same time, each from its last corner to its first.

    Columns are stored in reverse, so that an anti-diagonal becomes a diagonal, of which torch has a view. exact: the
    weights; steps: their scales; l_factor, m_factor: for each block the diagonal blocks of L, at its columns, and of M, at
    its rows.
    """

    def __init__(
        self, exact: torch.Tensor, steps: torch.Tensor, l_factor: torch.Tensor, m_factor: torch.Tensor, scheme: LinearScheme
    ) -> None:
        self._scheme = scheme
        self._exact, self._steps = exact.flip(2), steps.flip(2)
        # How an error spreads to the entries not rounded yet; contiguous in the order in which it is read.
        self._to_columns, self._to_rows = l_factor.tril(-1).flip(1, 2).contiguous(), m_factor.tril(-1).mT.contiguous()
        self._l_diagonal, self._m_diagonal = l_factor.diagonal(dim1=1, dim2=2).flip(1), m_factor.diagonal(dim1=1, dim2=2)

    def round(self, el: torch.Tensor, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The errors E and the complete E L of the blocks, float32 [n, rows, columns] each.

        el: E L of the columns rounded before; mel: M^T E L of the rows rounded before; same shape.
        """
        el, mel = el.flip(2), mel.flip(2)
        _, height, width = el.shape
        errors = torch.empty_like(el)
        inverse_l, inverse_m = self._l_diagonal.reciprocal(), self._m_diagonal.reciprocal()
        for diagonal in range(height + width - 2, -1, -1):
            top, bottom = max(0, diagonal - width + 1), min(diagonal, height - 1) + 1
            left = width - 1 - diagonal + top
            right = left + bottom - top
            exact, step, own_el, own_mel = (
                x[:, top:bottom, left:right].diagonal(dim1=1, dim2=2) for x in (self._exact, self._steps, el, mel)
            )
            shift = torch.addcmul(own_el, own_mel, inverse_m[:, top:bottom]).mul_(inverse_l[:, left:right])
            code = shift.add_(exact).div_(step).round_().clamp_(self._scheme.qmin, self._scheme.qmax)
            error = torch.addcmul(exact, code, step, value=-1)
            complete = torch.addcmul(own_el, error, self._l_diagonal[:, left:right])
            errors[:, top:bottom, left:right].diagonal(dim1=1, dim2=2).copy_(error)
            el[:, top:bottom, left:].addcmul_(error[:, :, None], self._to_columns[:, left:right, left:])
            own_el.copy_(complete)
            mel[:, :bottom, left:right].addcmul_(self._to_rows[:, :bottom, top:bottom], complete[:, None])
        return errors.flip(2), el.flip(2)
