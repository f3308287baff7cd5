"""Equalization factors and activation ranges are chosen for the outputs whose errors matter, by the output Hessian."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from qvlm_export.calibrate.calibrators.block_search import BlockSearch
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.quantization.config import KRONECKER_LINEAR, LinearConfig, SearchConfig


class NormLinear(nn.Module):
    """A norm, and a linear whose two outputs have their largest weights at different channels."""

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
def search_block(scheme: LinearScheme, output: int, linear: LinearConfig) -> tuple[torch.Tensor, torch.Tensor, float | None]:
    """Searches a block where only errors of one output, by number, reach the model's output.

    Returns the equalized gain of the norm, float32 [64], each output's mean squared error [2], and the input scale.
    """
    module, inputs = NormLinear(), [torch.randn(4, 100, 64, generator=torch.Generator().manual_seed(1))]
    hessian = torch.zeros(2, 2)
    hessian[output, output] = 1.0
    method = SearchConfig("expected", linear)
    hessians = {"mlp.fc1": hessian}
    search = BlockSearch(module, {"mlp.fc1": scheme}, nn.Module.__call__, method, output_hessians=hessians, strict=True)
    float_outputs, outputs = search.search(inputs, inputs)
    errors = (outputs[0] - float_outputs[0]).square().mean((0, 1))
    return search.float_tensors()["layer_norm2.weight"], errors, search.quantized_linears()["mlp.fc1"].input_scale


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_output_whose_errors_matter_gets_the_smaller_error(scheme):
    (_, first, _), (_, second, _) = (search_block(scheme, output, KRONECKER_LINEAR) for output in range(2))
    assert first[0] * second[1] < 0.5 * second[0] * first[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_by_output_factors_and_ranges_do_not_depend_on_the_output_hessian(scheme):
    """Neither do the rounded weights: with a diagonal output Hessian, every output is rounded on its own."""
    linear = replace(KRONECKER_LINEAR, by_output=False)
    (gains, first, scale), (other_gains, second, other_scale) = (search_block(scheme, output, linear) for output in range(2))
    assert torch.equal(gains, other_gains)
    assert scale == other_scale
    assert torch.equal(first, second)
