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

LEAST = 512  # rows, columns and summands below which a call takes what the product gains
_MATMULS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}


def is_quicker() -> bool:
    """Whether this processor gains by it: asked of the processor, not measured, so that every run decides alike."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and is_there()


def is_there() -> bool:
    """Whether this torch has oneDNN's linear layer for dense tensors, which is what its own compiler calls."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
    rows = x.reshape(-1, x.shape[-1])
    found: torch.Tensor = _Linear.apply(rows, weight, bias)
    return found.reshape(*x.shape[:-1], len(weight))


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias. x: [rows, in]; weight: [out, in]."""
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


class _Linear(torch.autograd.Function):
    """The same with gradients; what they do not need is not kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As `_product`."""
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of x, weight and bias, by that of the output [rows, out]."""
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        return (
            None if weight is None else _product(gradient, weight.T),
            None if x is None else _product(gradient.T, x.T),
            gradient.sum(0) if ctx.needs_input_grad[2] else None,
        )
