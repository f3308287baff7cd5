"""Factors and ranges, too, are chosen for what errors of each output do to the answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from qvlm_export.calibrate.calibrators.block_search import BlockSearch
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.quantization.config import KRONECKER_LINEAR, LinearConfig, SearchConfig


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


SCHEMES = [LinearScheme(3, None, 64), LinearScheme(4, 8, 64), LinearScheme(8, 8, None)]


@torch.no_grad()
def searched(scheme: LinearScheme, counting: int, variant: LinearConfig) -> tuple[torch.Tensor, torch.Tensor, float | None]:
    """What a factor left of the norm's gain, float32 [64], each output's squared error [2], and the range of activations,
    where only errors of the output `counting` reach the answers."""
    module, inputs = Reader(), [torch.randn(4, 100, 64, generator=torch.Generator().manual_seed(1))]
    metric = torch.zeros(2, 2)
    metric[counting, counting] = 1.0
    method = SearchConfig("expected", variant)
    search = BlockSearch(module, {"mlp.fc1": scheme}, nn.Module.__call__, method, output_hessians={"mlp.fc1": metric})
    wanted, found = search.search(inputs, inputs)
    errors = (found[0] - wanted[0]).square().mean((0, 1))
    return search.floats()["layer_norm2.weight"], errors, search.found()["mlp.fc1"].input_scale


@pytest.mark.parametrize("scheme", SCHEMES)
def test_factors_suit_the_output_whose_errors_count(scheme):
    (_, first, _), (_, second, _) = (searched(scheme, counting, KRONECKER_LINEAR) for counting in range(2))
    assert first[0] * second[1] < 0.5 * second[0] * first[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_factors_and_ranges_of_the_output_as_it_is(scheme):
    """The ablation: without it nothing depends on which output counts, where rounding takes them one at a time, too."""
    variant = replace(KRONECKER_LINEAR, by_output=False)
    (gains, first, scale), (other_gains, second, other_scale) = (
        searched(scheme, counting, variant) for counting in range(2)
    )
    assert torch.equal(gains, other_gains)
    assert scale == other_scale
    assert torch.equal(first, second)
