"""Blocked left-looking Cholesky factorization whose result does not depend on the number of threads, to the last bit.

The last bits of LAPACK's factor depend on the number of threads, so LAPACK runs on one thread. Large matrices are factored
here by block columns, from left to right: the rows of a block column do not depend on each other, so threads share them
out in tiles whose sizes do not depend on the number of threads, and one thread computes each tile.
"""

from __future__ import annotations

import torch

from qvlm_export.calibrate.numerics.threads import map_on_threads, one_thread

MIN_BLOCKED_ROWS = 2048  # rows from which on the blocked factorization pays
BLOCK_COLUMNS = 768
# Rows of the factor that one thread computes at a time: below a diagonal block, and inside one.
PANEL_ROWS, DIAGONAL_ROWS = 384, 192


def cholesky_(lower: torch.Tensor) -> bool:
    """Overwrites a symmetric positive definite matrix [n, n] with its lower Cholesky factor, and returns True.

    Returns False when the matrix is not positive definite; its content is then of no use. Only the entries on and below the
    diagonal are read, and those above become zero. The columns should be contiguous in memory.
    """
    if lower.device.type != "cpu" or len(lower) < MIN_BLOCKED_ROWS:
        failed = torch.ones((), dtype=torch.int32, device=lower.device)
        with one_thread():
            torch.linalg.cholesky_ex(lower, out=(lower, failed))
        return not int(failed)
    upper = lower.mT  # the matrix becomes U^T U; rows of U are contiguous
    for start in range(0, len(upper), BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, len(upper))
        if not _factor_rows_(upper, start, end):
            return False
        upper[end:, start:end] = 0
    return True


def _factor_rows_(upper: torch.Tensor, start: int, end: int) -> bool:
    """Computes rows start to end of U in place from the rows above; False when the matrix is not positive definite."""
    above, diagonal_block = upper[:start, start:end].mT, upper[start:end, start:end]

    def subtract_above(columns: slice) -> torch.Tensor:
        """The part of these rows [end - start, columns] that the rows above leave to be factored (Schur complement)."""
        return torch.addmm(upper[start:end, columns], above, upper[:start, columns], alpha=-1)

    tiles = [slice(n, min(n + DIAGONAL_ROWS, end)) for n in range(start, end, DIAGONAL_ROWS)]
    square = torch.cat(map_on_threads(subtract_above, tiles), 1)
    with one_thread():
        factor, failed = torch.linalg.cholesky_ex(square.mT)
    if int(failed):
        return False
    diagonal_block.copy_(factor.mT)

    def solve_(first: int) -> None:
        columns = slice(first, first + PANEL_ROWS)
        upper[start:end, columns] = torch.linalg.solve_triangular(factor, subtract_above(columns), upper=False)

    map_on_threads(solve_, range(end, len(upper), PANEL_ROWS))
    return True
