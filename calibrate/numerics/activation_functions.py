"""Activation functions whose results do not depend on the number of threads, to the last bit.

torch divides the values of a tensor among its threads, and computes those at the end of each share, which do not fill a
vector register, by other instructions than the rest. Which values these are depends on the number of threads, and with them
the last bit of functions such as exp(). An activation function takes little of a block's time compared with its matrix
products, so one thread computes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2CLS

from qvlm_export.calibrate.numerics.threads import one_thread

ACTIVATION_CLASSES = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}


class DeterministicActivation(nn.Module):
    """Wraps an activation function; on a CPU one thread computes its forward and its backward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The activation function of x, of the same shape."""
        if x.device.type != "cpu" or torch.get_num_threads() == 1:
            return self.inner(x)
        if torch.is_grad_enabled() and x.requires_grad:
            output: torch.Tensor = _SingleThreadedActivation.apply(x, self.inner)
            return output
        with one_thread():
            return self.inner(x)


class _SingleThreadedActivation(torch.autograd.Function):
    """Saves only the input and recomputes the function in the backward pass, with one thread in both passes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, inner: nn.Module) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.inner = inner
        with one_thread():
            return inner(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        with one_thread(), torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(ctx.inner(leaf), leaf, gradients)
        return gradient, None


def use_deterministic_activations(model: nn.Module) -> None:
    """Wraps every activation function of transformers inside `model` that has no parameters in a DeterministicActivation."""
    for name, layer in list(model.named_modules()):
        if name and type(layer) in ACTIVATION_CLASSES and not list(layer.parameters()):
            model.set_submodule(name, DeterministicActivation(layer))
