"""Parallelism whose results do not depend on the number of threads.

Work is divided into independent parts, and one thread computes each part whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")


@contextmanager
def one_thread() -> Iterator[None]:
    """A context in which torch computes with one thread.

    LAPACK's factorizations need it, because their last bits depend on the number of threads.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def map_on_threads(compute: Callable[[_Part], _Result], parts: Sequence[_Part]) -> list[_Result]:
    """The results of `compute` for all parts, in order. As many threads as torch has share out whole parts.

    Gradients are recorded where the caller records them.
    """
    threads = torch.get_num_threads()
    with one_thread():
        if threads == 1 or len(parts) <= 1:
            return [compute(part) for part in parts]
        recording, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()  # both are set by thread

        def compute_as_caller(part: _Part) -> _Result:
            with torch.inference_mode(inference), torch.set_grad_enabled(recording):
                return compute(part)

        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(compute_as_caller, parts))
