"""Cholesky factors by blocks: those of LAPACK, the same bits on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qvlm_export.calibrate.numerics import cholesky
from qvlm_export.calibrate.numerics.cholesky import BLOCK, LARGE, cholesky_

# Below and above LARGE; a last block and a last piece that are not whole; exactly whole blocks.
SIZES = [5, LARGE - 1, LARGE, LARGE + BLOCK + 77]


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def gram(size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Symmetric, positive definite, of unequal sizes of its inputs; its columns lie one behind another."""
    generator = torch.Generator().manual_seed(size)
    inputs = torch.randn(size + 20, size, generator=generator, dtype=dtype) * torch.linspace(0.1, 3, size, dtype=dtype)
    found = inputs.T @ inputs
    found.diagonal().add_(0.01 * found.diagonal().mean())
    return found.mT


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_it_is_lapacks_factor(size: int, dtype: torch.dtype, rtol: float) -> None:
    matrix = gram(size, dtype)
    wanted, found = torch.linalg.cholesky(matrix.double()), matrix.clone()
    assert cholesky_(found)
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=rtol * float(wanted.diagonal().mean()))
    assert not found.triu(1).any()


@pytest.mark.usefixtures("_threads")
def test_the_same_bits_on_one_thread_and_on_two() -> None:
    matrix, found = gram(LARGE + 3 * BLOCK + 5), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(matrix.clone())
        assert cholesky_(found[-1])
        assert torch.get_num_threads() == count
    assert torch.equal(*found)


def test_what_lies_above_the_diagonal_is_not_read() -> None:
    matrix = gram(LARGE)
    spoiled = matrix.clone()
    spoiled.mT[torch.ones(LARGE, LARGE).tril(-1).bool()] = torch.nan
    assert cholesky_(matrix)
    assert cholesky_(spoiled)
    assert torch.equal(matrix, spoiled)


@pytest.mark.parametrize("size", [64, LARGE + 100])
@pytest.mark.parametrize("place", [0, -1])
def test_a_matrix_that_is_not_positive_definite_is_told(size: int, place: int) -> None:
    matrix = gram(size)
    matrix[place, place] = -1.0
    assert not cholesky_(matrix)


def test_pieces_do_not_show_in_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece is right, not only the ones that this machine's sizes make."""
    monkeypatch.setattr(cholesky, "LARGE", 2)
    monkeypatch.setattr(cholesky, "BLOCK", 7)
    monkeypatch.setattr(cholesky, "PIECE", 3)
    matrix = gram(50)
    found = matrix.clone()
    assert cholesky_(found)
    torch.testing.assert_close(found, torch.linalg.cholesky(matrix), rtol=1e-9, atol=1e-9)
