"""Activation functions have the same values and gradients on several threads as on one, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_export import open_small
from torch import nn
from transformers.activations import ACT2FN

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.numerics.activation_functions import (
    ACTIVATION_CLASSES,
    DeterministicActivation,
    use_deterministic_activations,
)

THREAD_COUNTS = (1, 2, 3, 5)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def outputs_by_thread_count(function: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each of THREAD_COUNTS: values without autograd, values with autograd, and gradients.

    The tensor's size makes the shares of the threads end in the middle of a vector register.
    """
    generator, outputs = torch.Generator().manual_seed(0), []
    x, output_gradient = torch.randn(2, 37, 2053, generator=generator)
    for count in THREAD_COUNTS:
        torch.set_num_threads(count)
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        (gradient,) = torch.autograd.grad(y, leaf, output_gradient)
        outputs.append((function(x), y.detach(), gradient))
        assert torch.get_num_threads() == count
    return outputs


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "quick_gelu"])
def test_values_and_gradients_do_not_depend_on_the_number_of_threads(name: str) -> None:
    one, *others = outputs_by_thread_count(DeterministicActivation(ACT2FN[name]))
    assert torch.equal(one[0], one[1])
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_on_one_thread_values_equal_those_of_the_wrapped_function() -> None:
    exact = outputs_by_thread_count(ACT2FN["quick_gelu"])[0]
    wrapped = outputs_by_thread_count(DeterministicActivation(ACT2FN["quick_gelu"]))[0]
    assert all(torch.equal(a, b) for a, b in zip(exact, wrapped, strict=True))


def test_the_activation_of_every_block_is_wrapped(llava) -> None:
    blocks = make_blocks(open_small(llava()).hf_config)
    for block in blocks.all():
        wrapped = [m for m in block.module.modules() if isinstance(m, DeterministicActivation)]
        assert len(wrapped) == 1
        unwrapped = [m for m in block.module.modules() if type(m) in ACTIVATION_CLASSES]
        assert unwrapped == [wrapped[0].inner]


def test_an_activation_with_parameters_is_not_wrapped() -> None:
    model = nn.Sequential(nn.PReLU(), nn.SiLU(), nn.Linear(2, 2))
    use_deterministic_activations(model)
    assert [type(layer) for layer in model] == [nn.PReLU, DeterministicActivation, nn.Linear]
