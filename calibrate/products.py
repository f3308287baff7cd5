"""Large float32 products by oneDNN, on processors where that is quicker than torch's BLAS. torch.

torch hands float32 products to MKL, which uses no more than AVX2 on processors that are not Intel's. oneDNN, which torch
holds, too, uses AVX-512 on all of them: on an AMD EPYC with AVX-512 twice as many operations a second, in the same 32 bits.
On an Intel processor both do the same, and where there is no AVX-512 everything stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

LEAST = 512  # rows, columns and summands below which copying takes what the product gains
_MATMULS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}


def is_quicker() -> bool:
    """Whether this processor gains by it: asked of the processor, not measured, so that every run decides alike."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


@contextmanager
def quick_products() -> Iterator[None]:
    """Inside, `@` and linear layers of large float32 matrices on the CPU are computed by oneDNN, gradients included."""
    if not is_quicker():
        yield
        return
    with _Products():
        yield


class _Products(TorchFunctionMode):
    """Sees every call of torch in this thread and takes over the products."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not kwargs:
            if func is nn.functional.linear and _is_large(args[0], args[1]):
                return _linear(*args)
            if func in _MATMULS and args[1].dim() == 2 and _is_large(args[0], args[1].mT):
                return _linear(args[0], args[1].mT)
        return func(*args, **(kwargs or {}))


def _is_large(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """x: [..., in]; weight: [out, in]."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu":
        return False
    return min(weight.shape) >= LEAST and x.numel() >= LEAST * weight.shape[1]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).to_mkldnn()
    return nn.functional.linear(rows, weight, bias).to_dense().reshape(*x.shape[:-1], len(weight))
