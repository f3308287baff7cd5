"""Threads that do not show in the result: the same bytes on one core and on many. torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_Part = TypeVar("_Part")
_Found = TypeVar("_Found")


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread inside, as LAPACK's factorizations must: their last bits depend on the number."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def map_on_threads(compute: Callable[[_Part], _Found], parts: Sequence[_Part]) -> list[_Found]:
    """`compute` of every part, by as many threads as torch has, none of which divides a part."""
    threads = torch.get_num_threads()
    with one_thread():
        if threads == 1 or len(parts) <= 1:
            return [compute(part) for part in parts]
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(compute, parts))
