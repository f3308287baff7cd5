"""Float32 matrix products by oneDNN, on processors where it is faster than torch's BLAS.

torch computes float32 products with MKL, which uses no more than AVX2 on processors that are not Intel's. oneDNN, which is
part of torch, too, uses AVX-512 on all of them: on an AMD EPYC with AVX-512 it does twice as many operations per second, in
the same 32 bits. On an Intel processor both do the same, and without AVX-512 torch's BLAS computes everything.

On several threads MKL splits products of few rows or few columns, above all long ones, in another way than on one thread
(5, 7 or 9 rows; on an Intel processor 37 columns of 1088 summands), which changes the last bits. So one thread computes
such products.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from qvlm_export.calibrate.numerics.threads import one_thread

MIN_ONEDNN_SIZE = 64  # with fewer rows, columns or summands the overhead of a call outweighs the gain


def prefers_onednn() -> bool:
    """Whether oneDNN is faster on this processor.

    Decided by the processor's capabilities and not by a measurement, so that every run decides alike.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and has_onednn_linear()


def has_onednn_linear() -> bool:
    """Whether this build of torch has oneDNN's linear layer for dense tensors, the one that torch's own compiler calls."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b`, [..., out], for a [..., in] and b [in, out]."""
    if b.dim() == 2 and _uses_onednn(a, b.mT):
        return _apply_onednn_linear(a, b.mT, None)
    with deterministic_small_matmul(a, b.shape[-1]):
        return a @ b


def apply_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` of x [..., in], weight [out, in] and bias [out]: [..., out], differentiable."""
    if _uses_onednn(x, weight):
        return _apply_onednn_linear(x, weight, bias)
    with deterministic_small_matmul(x, len(weight)):
        return nn.functional.linear(x, weight, bias)


def deterministic_small_matmul(x: torch.Tensor, columns: int = MIN_ONEDNN_SIZE) -> AbstractContextManager[None]:
    """A context for products of x [..., in] with `columns` output columns, and for their gradients.

    On a CPU, torch computes with one thread inside where x has few rows or the product few columns.
    """
    few = x.numel() < MIN_ONEDNN_SIZE * x.shape[-1] or columns < MIN_ONEDNN_SIZE
    return one_thread() if few and x.device.type == "cpu" else nullcontext()


class OneDnnLinear(nn.Linear):
    """A linear layer that computes with `apply_linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        return apply_linear(x, self.weight, self.bias)


def use_onednn_linears(model: nn.Module) -> None:
    """Replaces every `nn.Linear` of a model on the meta device, whose weights are not loaded yet, with an OneDnnLinear."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            replacement = OneDnnLinear(
                layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=layer.weight.dtype
            )
            replacement.train(layer.training).requires_grad_(layer.weight.requires_grad)
            model.set_submodule(name, replacement)


def _uses_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN computes the product of x [..., in] and weight [out, in]."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu":
        return False
    return min(weight.shape) >= MIN_ONEDNN_SIZE and x.numel() >= MIN_ONEDNN_SIZE * weight.shape[1] and prefers_onednn()


def _apply_onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`apply_linear` by oneDNN; goes through autograd only where a gradient is needed."""
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        output: torch.Tensor = _OneDnnLinearFunction.apply(rows, weight, bias)
    else:
        output = _multiply(rows, weight, bias)
    return output.reshape(*x.shape[:-1], len(weight))


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias, [rows, out], by oneDNN. x: [rows, in]; weight: [out, in]; bias: [out]."""
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return output


class _OneDnnLinearFunction(torch.autograd.Function):
    """`_multiply` with gradients; saves only the tensors that the requested gradients need."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `_multiply`."""
        needs_x_grad, needs_weight_grad, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight_grad else None, weight if needs_x_grad else None)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, weight and bias from that of the output [rows, out]; None for those that need none."""
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        return (
            None if weight is None else _multiply(gradient, weight.T),
            None if x is None else _multiply(gradient.T, x.T),
            gradient.sum(0) if ctx.needs_input_grad[2] else None,
        )
