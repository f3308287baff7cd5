"""Blocked Cholesky factorization, compared with LAPACK, and with itself on other numbers of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qvlm_export.calibrate.numerics import cholesky
from qvlm_export.calibrate.numerics.cholesky import BLOCK_COLUMNS, MIN_BLOCKED_ROWS, cholesky_

# Below and above LARGE; among them sizes that blocks and tiles do not divide.
SIZES = [5, MIN_BLOCKED_ROWS - 1, MIN_BLOCKED_ROWS, MIN_BLOCKED_ROWS + BLOCK_COLUMNS + 77]


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_hessian(size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A positive definite X^T X [size, size] of inputs X whose channels differ in magnitude; its columns are contiguous."""
    generator = torch.Generator().manual_seed(size)
    inputs = torch.randn(size + 20, size, generator=generator, dtype=dtype) * torch.linspace(0.1, 3, size, dtype=dtype)
    hessian = inputs.T @ inputs
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return hessian.mT


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_the_factor_equals_lapacks(size: int, dtype: torch.dtype, rtol: float) -> None:
    matrix = random_hessian(size, dtype)
    expected, factor = torch.linalg.cholesky(matrix.double()), matrix.clone()
    assert cholesky_(factor)
    torch.testing.assert_close(factor.double(), expected, rtol=rtol, atol=rtol * float(expected.diagonal().mean()))
    assert not factor.triu(1).any()


@pytest.mark.usefixtures("_threads")
def test_the_factor_has_the_same_bits_on_one_thread_and_on_two() -> None:
    matrix, factors = random_hessian(MIN_BLOCKED_ROWS + 3 * BLOCK_COLUMNS + 5), []
    for count in (1, 2):
        torch.set_num_threads(count)
        factors.append(matrix.clone())
        assert cholesky_(factors[-1])
        assert torch.get_num_threads() == count
    assert torch.equal(*factors)


def test_entries_above_the_diagonal_are_not_read() -> None:
    matrix = random_hessian(MIN_BLOCKED_ROWS)
    spoiled = matrix.clone()
    spoiled.mT[torch.ones(MIN_BLOCKED_ROWS, MIN_BLOCKED_ROWS).tril(-1).bool()] = torch.nan
    assert cholesky_(matrix)
    assert cholesky_(spoiled)
    assert torch.equal(matrix, spoiled)


@pytest.mark.parametrize("size", [64, MIN_BLOCKED_ROWS + 100])
@pytest.mark.parametrize("place", [0, -1])
def test_a_matrix_that_is_not_positive_definite_is_reported(size: int, place: int) -> None:
    matrix = random_hessian(size)
    matrix[place, place] = -1.0
    assert not cholesky_(matrix)


def test_the_factor_does_not_depend_on_the_sizes_of_blocks_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes reach every kind of tile with a small matrix."""
    monkeypatch.setattr(cholesky, "MIN_BLOCKED_ROWS", 2)
    monkeypatch.setattr(cholesky, "BLOCK_COLUMNS", 7)
    monkeypatch.setattr(cholesky, "PANEL_ROWS", 3)
    matrix = random_hessian(50)
    factor = matrix.clone()
    assert cholesky_(factor)
    torch.testing.assert_close(factor, torch.linalg.cholesky(matrix), rtol=1e-9, atol=1e-9)
