"""Float32 products by oneDNN, on processors where that is quicker than torch's BLAS. torch.

torch hands float32 products to MKL, which uses no more than AVX2 on processors that are not Intel's. oneDNN, which torch
holds, too, uses AVX-512 on all of them: on an AMD EPYC with AVX-512 twice as many operations a second, in the same 32 bits.
On an Intel processor both do the same, and where there is no AVX-512 everything stays as it is.

MKL divides few rows or few columns, long ones above all, among threads in another way than among one (5, 7 or 9 rows; on an
Intel processor 37 columns of 1088 summands), and last bits with them, so one thread computes such products.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from qvlm_export.calibrate.numerics.threads import one_thread

MIN_ONEDNN_SIZE = 64  # rows, columns and summands below which a call takes what the product gains


def prefers_onednn() -> bool:
    """Whether this processor gains by it: asked of the processor, not measured, so that every run decides alike."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and has_onednn_linear()


def has_onednn_linear() -> bool:
    """Whether this torch has oneDNN's linear layer for dense tensors, which is what its own compiler calls."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b`, of a [..., in] and b [in, out]."""
    if b.dim() == 2 and _is_taken(a, b.mT):
        return _taken(a, b.mT, None)
    with deterministic_small_matmul(a, b.shape[-1]):
        return a @ b


def apply_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` of x [..., in], weight [out, in] and bias [out], gradients included."""
    if _is_taken(x, weight):
        return _taken(x, weight, bias)
    with deterministic_small_matmul(x, len(weight)):
        return nn.functional.linear(x, weight, bias)


def deterministic_small_matmul(x: torch.Tensor, columns: int = MIN_ONEDNN_SIZE) -> AbstractContextManager[None]:
    """For products of x [..., in] with so many columns, and their gradients; few columns are divided as few rows are."""
    few = x.numel() < MIN_ONEDNN_SIZE * x.shape[-1] or columns < MIN_ONEDNN_SIZE
    return one_thread() if few and x.device.type == "cpu" else nullcontext()


class OneDnnLinear(nn.Linear):
    """A linear layer that computes by `apply_linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return apply_linear(x, self.weight, self.bias)


def use_onednn_linears(model: nn.Module) -> None:
    """Puts a QuickLinear in the place of each linear layer of a model that lies on meta, and has no tensors yet."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            quick = OneDnnLinear(
                layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=layer.weight.dtype
            )
            quick.train(layer.training).requires_grad_(layer.weight.requires_grad)
            model.set_submodule(name, quick)


def _is_taken(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """x: [..., in]; weight: [out, in]."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu":
        return False
    return min(weight.shape) >= MIN_ONEDNN_SIZE and x.numel() >= MIN_ONEDNN_SIZE * weight.shape[1] and prefers_onednn()


def _taken(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        found: torch.Tensor = _Linear.apply(rows, weight, bias)
    else:
        found = _product(rows, weight, bias)
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
