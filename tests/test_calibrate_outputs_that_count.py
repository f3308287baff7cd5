"""Factors and ranges, too, are chosen for what errors of each output do to the answers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calibrate.method import TWO_SIDED, Method
from calibrate.scheme import LinearScheme
from calibrate.search import BlockSearch


class Reader(nn.Module):
    """A norm, and a linear of two outputs that read different channels most."""

    @torch.no_grad()
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer_norm2, self.mlp = nn.LayerNorm(64), nn.Module()
        self.mlp.fc1 = nn.Linear(64, 2)
        self.mlp.fc1.weight.mul_(torch.randn(2, 64).mul(2).exp())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp.fc1(self.layer_norm2(x))


@pytest.mark.parametrize("scheme", [LinearScheme(3, None, 64), LinearScheme(4, 8, 64), LinearScheme(8, 8, None)])
@torch.no_grad()
def test_factors_suit_the_output_whose_errors_count(scheme):
    wrong = []
    for counting in range(2):
        module, inputs = Reader(), [torch.randn(4, 100, 64, generator=torch.Generator().manual_seed(1))]
        metric = torch.zeros(2, 2)
        metric[counting, counting] = 1.0
        method = Method(("expected",), (TWO_SIDED,))
        search = BlockSearch(module, {"mlp.fc1": scheme}, nn.Module.__call__, method, metrics={"mlp.fc1": metric})
        wanted, found = search.search(inputs, inputs)
        wrong.append((found[0] - wanted[0]).square().mean((0, 1)))
    assert wrong[0][0] * wrong[1][1] < 0.5 * wrong[1][0] * wrong[0][1]
