"""Float32 matrix products whose bits do not depend on the number of threads, by the fastest library on the processor.

torch computes float32 products with MKL or with oneDNN, which is part of torch, too. MKL uses no more than AVX2 on
processors that are not Intel's, where oneDNN does twice as many operations per second with AVX-512, in the same 32 bits. On
an Intel processor MKL is up to twice as fast in products of many rows, most of all in Gram matrices.

But on several threads MKL splits many products in another way than on one thread: with AVX-512 those of most shapes, with
AVX2 those of few rows or few columns, above all long ones (5, 7 or 9 rows). That changes the last bits. So with AVX-512
oneDNN computes what is not large enough to be divided here into parts, each computed by MKL on one thread.
"""

from __future__ import annotations

import functools
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvlm_export.calibrate.numerics.threads import map_on_threads, one_thread

MIN_ONEDNN_SIZE = 64  # with fewer rows, columns or summands the overhead of a call outweighs the gain
PART_ROWS = 512  # rows of a product that one thread computes
PART_COLUMNS = 192  # columns of a Gram matrix that are computed at a time: narrow enough to skip most of its lower half
_CPU_INFO = Path("/proc/cpuinfo")


def prefers_onednn() -> bool:
    """Whether oneDNN computes products here that are not divided into parts.

    Decided by the processor's capabilities and not by a measurement, so that every run decides alike.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and has_onednn_linear()


def has_onednn_linear() -> bool:
    """Whether this build of torch has oneDNN's linear layer for dense tensors, the one that torch's own compiler calls."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def is_intel() -> bool:
    """Whether Intel made this processor, as far as the operating system says."""
    described = platform.processor()
    if _CPU_INFO.exists():
        described += _CPU_INFO.read_text(encoding="utf-8", errors="replace")
    return "GenuineIntel" in described


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b`, [..., out], for a [..., in] and b [in, out]."""
    if b.dim() == 2 and _is_large(a, b.mT):
        return _apply_large_linear(a, b.mT, None)
    with deterministic_small_matmul(a, b.shape[-1]):
        return a @ b


def apply_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` of x [..., in], weight [out, in] and bias [out]: [..., out], differentiable."""
    if _is_large(x, weight):
        return _apply_large_linear(x, weight, bias)
    with deterministic_small_matmul(x, len(weight)):
        return nn.functional.linear(x, weight, bias)


def transposed_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a.T @ b`, float32 [m, n], a sum over all tokens, for a [tokens, m] and b [tokens, n]."""
    if a.device.type != "cpu" or _prefers_strided_onednn():
        return matmul(a.T, b)
    parts = map_on_threads(lambda part: part.T @ b, a.split(PART_COLUMNS, dim=1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def gram(rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The Gram matrix X^T diag(w) X, float32 [in, in] and exactly symmetric, of rows X [tokens, in].

    weights: w, float32 [tokens]; None for ones. Its upper half is computed and mirrored.
    """
    weighted = rows if weights is None else rows * weights[:, None]
    if rows.device.type != "cpu":
        return weighted.T @ rows
    width, left, right = rows.shape[1], weighted.T, rows.T
    by_onednn = _prefers_strided_onednn()
    if by_onednn:  # it wants what is summed contiguous; on narrow strided views it takes a hundred times longer
        left, right = left.contiguous(), right.contiguous()
    result = torch.empty(width, width, dtype=rows.dtype)

    def compute(start: int) -> None:
        stop = min(start + PART_COLUMNS, width)
        part = apply_linear(left[start:stop], right[start:]) if by_onednn else left[start:stop] @ right[start:].T
        square = part[:, : stop - start]
        part[:, : stop - start] = square.triu() + square.triu(1).T
        result[start:stop, start:], result[start:, start:stop] = part, part.T

    map_on_threads(compute, range(0, width, PART_COLUMNS))
    return result


def deterministic_small_matmul(x: torch.Tensor, columns: int = MIN_ONEDNN_SIZE) -> AbstractContextManager[None]:
    """A context for products of x [..., in] with `columns` output columns, and for their gradients.

    On a CPU, torch computes with one thread inside where x has few rows or the product few columns.
    """
    few = x.numel() < MIN_ONEDNN_SIZE * x.shape[-1] or columns < MIN_ONEDNN_SIZE
    return one_thread() if few and x.device.type == "cpu" else nullcontext()


class MatmulLinear(nn.Linear):
    """A linear layer that computes with `apply_linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        return apply_linear(x, self.weight, self.bias)


def use_matmul_linears(model: nn.Module) -> None:
    """Replaces every `nn.Linear` of a model on the meta device, whose weights are not loaded yet, with a MatmulLinear."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            replacement = MatmulLinear(
                layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=layer.weight.dtype
            )
            replacement.train(layer.training).requires_grad_(layer.weight.requires_grad)
            model.set_submodule(name, replacement)


def _is_large(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `_multiply` computes the product of x [..., in] and weight [out, in], as BLAS would depend on threads."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu":
        return False
    return min(weight.shape) >= MIN_ONEDNN_SIZE and x.numel() >= MIN_ONEDNN_SIZE * weight.shape[1] and prefers_onednn()


def _apply_large_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`apply_linear` by `_multiply`; goes through autograd only where a gradient is needed."""
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        output: torch.Tensor = _LargeLinearFunction.apply(rows, weight, bias)
    else:
        output = _multiply(rows, weight, bias)
    return output.reshape(*x.shape[:-1], len(weight))


def _prefers_strided_onednn() -> bool:
    """Whether oneDNN is faster in products that sum over the rows of both factors."""
    return prefers_onednn() and not is_intel()


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias, [rows, out], without gradients: by oneDNN, or for many rows on Intel by MKL in parts.

    x: [rows, in]; weight: [out, in]; bias: [out].
    """
    if len(x) < 2 * PART_ROWS or not is_intel():
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return output
    output = torch.empty(len(x), len(weight))

    def compute(start: int) -> None:
        rows = slice(start, start + PART_ROWS)
        torch.mm(x[rows], weight.T, out=output[rows])

    map_on_threads(compute, range(0, len(x), PART_ROWS))
    return output if bias is None else output.add_(bias)


class _LargeLinearFunction(torch.autograd.Function):
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
