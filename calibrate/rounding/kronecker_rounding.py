"""Rounding a weight so that what its error does to the answers is least. torch.

GPTQ counts an error by the inputs that meet it, e H e^T for each output on its own. But errors of outputs can make up for
one another, too: most directions of a linear's output hardly move the logits. With G = sum l g g^T over the gradients g of
the answers' logits by the outputs at every token, all codes of the linear are chosen for

    tr(E^T G E H),  E [out, in] the weight's error,

the Kronecker form of the model's second derivative (Martens and Grosse 2015, section 3), as rounding towards a model's
output uses it (Tseng et al. 2025, arXiv 2505.22988). H = L L^T and G = M M^T, rows and columns in the reverse of the order
of rounding (`gptq.py`). The error is |M^T E L|^2, whose entry (i, j) depends on the errors of what is rounded before, of
outputs from i and columns from j on. Choosing E_ij to make it least is Babai's nearest plane again. Entries on an
anti-diagonal do not depend on one another and are rounded together.

l is the leverage of the token's input, x^T H^-1 x: rounding leaves E L about equally large in all directions, so that at a
token whose input is like few others, E x is large where at the many tokens alike it is small.
"""

from __future__ import annotations

import torch
from torch import nn

from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.quantization.hessian import HessianFactor, factor_hessian
from qvlm_export.calibrate.quantization.quantizer import expand_scales
from qvlm_export.calibrate.rounding.output_hessian import DAMPING

BLOCK = 128  # rows and columns that anti-diagonals are walked in; between blocks errors go by matrix products


def factor_output_hessian(metric: torch.Tensor, device: torch.device) -> HessianFactor:
    """Order of the outputs and M, from the metric as it is kept."""
    kept = metric.to(device).float()
    gram = kept if len(kept) == kept.shape[1] else matmul(kept.T, kept)
    size = gram.diagonal().mean().clamp(min=1e-30)
    return factor_hessian(gram / size, DAMPING)


def kronecker_round(
    weight: torch.Tensor, columns: HessianFactor, rows: HessianFactor, scale: torch.Tensor, scheme: LinearScheme
) -> torch.Tensor:
    """Codes int8 [out, in] for fixed scales. weight: float32 [out, in]; columns: of H; rows: of G; scale as stored.

    Blocks are walked in anti-diagonals, too, those of one at once.
    """
    (out, into), size = weight.shape, BLOCK
    # What is rounded last is made up to whole blocks by entries that nothing depends on.
    high, wide = -(-out // size) * size, -(-into // size) * size
    across, down = _Factor(columns.lower, wide - into), _Factor(rows.lower, high - out)
    exact, steps = (weight.new_full((high, wide), fill) for fill in (0.0, 1.0))
    exact[high - out :, wide - into :] = weight[rows.order][:, columns.order]
    steps[high - out :, wide - into :] = expand_scales(scale, into)[rows.order][:, columns.order]
    errors, owed = torch.zeros_like(exact), torch.zeros_like(exact)  # E, and E L as far as it is known
    for diagonal in range(high // size + wide // size - 2, -1, -1):
        places = range(max(0, diagonal - wide // size + 1), min(diagonal, high // size - 1) + 1)
        parts = [(slice(n * size, (n + 1) * size), slice((diagonal - n) * size, (diagonal - n + 1) * size)) for n in places]
        for own, part in parts:
            owed[own, part] = matmul(errors[own, part.stop :], across.below(part))
        blocks = _Blocks(
            torch.stack([exact[at] for at in parts]),
            torch.stack([steps[at] for at in parts]),
            torch.stack([across.square(part) for _, part in parts]),
            torch.stack([down.square(own) for own, _ in parts]),
            scheme,
        )
        pulled = torch.stack([matmul(down.below(own).T, owed[own.stop :, part]) for own, part in parts])
        found = blocks.rounded(torch.stack([owed[at] for at in parts]), pulled)
        for at, error, whole in zip(parts, *found, strict=True):
            errors[at], owed[at] = error, whole
    codes = ((exact - errors) / steps).round_()[high - out :, wide - into :].to(torch.int8)
    restored = torch.empty_like(codes)
    restored[rows.order[:, None], columns.order] = codes
    return restored


class _Factor:
    """A lower factor as float32 blocks, made up to whole blocks by `more` rows and columns before it."""

    def __init__(self, lower: torch.Tensor, more: int) -> None:
        self._lower, self._more = lower, more

    def square(self, part: slice) -> torch.Tensor:
        """Of its diagonal."""
        found = torch.eye(part.stop - part.start, device=self._lower.device)
        start = max(part.start, self._more)
        inside = slice(start - self._more, part.stop - self._more)
        found[start - part.start :, start - part.start :] = self._lower[inside, inside].float()
        return found

    def below(self, part: slice) -> torch.Tensor:
        """What is below the square."""
        start = max(part.start, self._more)
        found = self._lower[part.stop - self._more :, start - self._more : part.stop - self._more].float()
        return nn.functional.pad(found, (start - part.start, 0))


class _Blocks:
    """Blocks [n, rows, columns] while they are rounded, all from the last corner to the first.

    Columns are kept in reverse, so that an anti-diagonal is a diagonal, which is a view. across, down: lower squares of L
    and M for each.
    """

    def __init__(
        self, exact: torch.Tensor, steps: torch.Tensor, across: torch.Tensor, down: torch.Tensor, scheme: LinearScheme
    ) -> None:
        self._scheme = scheme
        self._exact, self._steps = exact.flip(2), steps.flip(2)
        # What an error does to entries still free; in memory as it is read.
        self._columns, self._rows = across.tril(-1).flip(1, 2).contiguous(), down.tril(-1).mT.contiguous()
        self._across, self._down = across.diagonal(dim1=1, dim2=2).flip(1), down.diagonal(dim1=1, dim2=2)

    def rounded(self, owed: torch.Tensor, pulled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Errors and E L of the blocks. owed: E L of the columns rounded before; pulled: M^T E L of the rows before."""
        owed, pulled = owed.flip(2), pulled.flip(2)
        _, height, width = owed.shape
        errors = torch.empty_like(owed)
        by_column, by_row = self._across.reciprocal(), self._down.reciprocal()
        for diagonal in range(height + width - 2, -1, -1):
            top, bottom = max(0, diagonal - width + 1), min(diagonal, height - 1) + 1
            left = width - 1 - diagonal + top
            right = left + bottom - top
            exact, step, before, above = (
                x[:, top:bottom, left:right].diagonal(dim1=1, dim2=2) for x in (self._exact, self._steps, owed, pulled)
            )
            makes_up = torch.addcmul(before, above, by_row[:, top:bottom]).mul_(by_column[:, left:right])
            code = makes_up.add_(exact).div_(step).round_().clamp_(self._scheme.qmin, self._scheme.qmax)
            error = torch.addcmul(exact, code, step, value=-1)
            done = torch.addcmul(before, error, self._across[:, left:right])
            errors[:, top:bottom, left:right].diagonal(dim1=1, dim2=2).copy_(error)
            owed[:, top:bottom, left:].addcmul_(error[:, :, None], self._columns[:, left:right, left:])
            before.copy_(done)
            pulled[:, :bottom, left:right].addcmul_(self._rows[:, :bottom, top:bottom], done[:, None])
        return errors.flip(2), owed.flip(2)
