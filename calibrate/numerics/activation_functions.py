"""Activation functions that are the same to the last bit on any number of threads. torch.

torch divides a tensor's values among its threads, and computes those that do not fill a register by other instructions than
the rest. Which ones these are depends on where the shares end, so exp() of a value does, too, in its last bit. Such a
function takes little of a block's time beside its products, so one thread computes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2CLS

from qvlm_export.calibrate.numerics.threads import one_thread

FUNCTIONS = {found[0] if isinstance(found, tuple) else found for found in ACT2CLS.values()}


class DeterministicActivation(nn.Module):
    """`inner`, computed by one thread on a CPU; the way back, too."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The shape of x."""
        if x.device.type != "cpu" or torch.get_num_threads() == 1:
            return self.inner(x)
        if torch.is_grad_enabled() and x.requires_grad:
            found: torch.Tensor = _OnOneThread.apply(x, self.inner)
            return found
        with one_thread():
            return self.inner(x)


class _OnOneThread(torch.autograd.Function):
    """Computes once more on the way back, and keeps the input only."""

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
            given = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(ctx.inner(given), given, gradients)
        return found, None


def use_deterministic_activations(model: nn.Module) -> None:
    """Puts a SteadyActivation around each of transformers' activation functions that has no parameters."""
    for name, layer in list(model.named_modules()):
        if name and type(layer) in FUNCTIONS and not list(layer.parameters()):
            model.set_submodule(name, DeterministicActivation(layer))
