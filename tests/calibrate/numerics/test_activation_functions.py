"""Activation functions on several threads: the same values and gradients as on one, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_export import open_small
from torch import nn
from transformers.activations import ACT2FN

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.numerics.activation_functions import (
    FUNCTIONS,
    DeterministicActivation,
    use_deterministic_activations,
)

COUNTS = (1, 2, 3, 5)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def found_by(function: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Values without and with gradients, and gradients, by COUNTS. Shares of values end in the middle of a register."""
    generator, found = torch.Generator().manual_seed(0), []
    x, towards = torch.randn(2, 37, 2053, generator=generator)
    for count in COUNTS:
        torch.set_num_threads(count)
        given = x.clone().requires_grad_()
        y = function(given)
        (gradient,) = torch.autograd.grad(y, given, towards)
        found.append((function(x), y.detach(), gradient))
        assert torch.get_num_threads() == count
    return found


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "quick_gelu"])
def test_threads_do_not_show(name: str) -> None:
    one, *others = found_by(DeterministicActivation(ACT2FN[name]))
    assert torch.equal(one[0], one[1])
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_on_one_thread_it_is_the_function_itself() -> None:
    exact, steady = found_by(ACT2FN["quick_gelu"])[0], found_by(DeterministicActivation(ACT2FN["quick_gelu"]))[0]
    assert all(torch.equal(a, b) for a, b in zip(exact, steady, strict=True))


def test_every_activation_of_every_block_is_one(llava) -> None:
    blocks = make_blocks(open_small(llava()).hf_config)
    for block in blocks.all():
        found = [m for m in block.module.modules() if isinstance(m, DeterministicActivation)]
        assert len(found) == 1
        bare = [m for m in block.module.modules() if type(m) in FUNCTIONS]
        assert bare == [found[0].inner]


def test_one_with_parameters_stays() -> None:
    model = nn.Sequential(nn.PReLU(), nn.SiLU(), nn.Linear(2, 2))
    use_deterministic_activations(model)
    assert [type(layer) for layer in model] == [nn.PReLU, DeterministicActivation, nn.Linear]
