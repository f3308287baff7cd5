"""Cholesky factors of large matrices, the same to the last bit on any number of threads. torch.

LAPACK's last bits depend on the number of threads, so it is held to one. Large matrices are factored here, by columns of
blocks from left to right: the rows of a block column do not depend on each other, so threads share them out in pieces that
are the same however many there are, and each piece is computed by one thread.
"""

from __future__ import annotations

import torch

from qvlm_export.calibrate.numerics.threads import map_on_threads, one_thread

LARGE = 2048  # rows from which on pieces are worth it
BLOCK = 768  # columns at a time
PIECE, NARROW = 384, 192  # rows that one thread computes: of what is below the diagonal, of a square on it


def cholesky_(lower: torch.Tensor) -> bool:
    """Replaces a symmetric positive definite matrix by its lower Cholesky factor; False, and of no use, if it is not so.

    Its columns should lie one behind another in memory; only what is on and below the diagonal is read.
    """
    if lower.device.type != "cpu" or len(lower) < LARGE:
        failed = torch.ones((), dtype=torch.int32, device=lower.device)
        with one_thread():
            torch.linalg.cholesky_ex(lower, out=(lower, failed))
        return not int(failed)
    upper = lower.mT  # U^T U, rows one behind another
    for start in range(0, len(upper), BLOCK):
        end = min(start + BLOCK, len(upper))
        if not _next_rows_(upper, start, end):
            return False
        upper[end:, start:end] = 0
    return True


def _next_rows_(upper: torch.Tensor, start: int, end: int) -> bool:
    """Rows start to end of U, from those above."""
    above, own = upper[:start, start:end].mT, upper[start:end, start:end]

    def less_known(columns: slice) -> torch.Tensor:
        return torch.addmm(upper[start:end, columns], above, upper[:start, columns], alpha=-1)

    square = torch.cat(map_on_threads(less_known, [slice(n, min(n + NARROW, end)) for n in range(start, end, NARROW)]), 1)
    with one_thread():
        factor, failed = torch.linalg.cholesky_ex(square.mT)
    if int(failed):
        return False
    own.copy_(factor.mT)

    def solve_(first: int) -> None:
        columns = slice(first, first + PIECE)
        upper[start:end, columns] = torch.linalg.solve_triangular(factor, less_known(columns), upper=False)

    map_on_threads(solve_, range(end, len(upper), PIECE))
    return True
