"""Output matching makes up for the error that the residual stream already has where a linear's output is added to it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from random_blocks import KINDS, make_block
from torch import nn

from qvlm_export.calibrate.calibrators import block_search
from qvlm_export.calibrate.calibrators.block_search import BlockSearch
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.quantization.config import FAST, FAST_LINEAR
from qvlm_export.calibrate.quantization.tokens import mean_token_error
from qvlm_export.calibrate.rounding.quantize_linears import LayerInputs, quantize_linears

INT4, INT8 = LinearScheme(4, None, 32), LinearScheme(8, None, None)
OWN_OUTPUTS = replace(FAST, linear=replace(FAST_LINEAR, match_residual=False))


def search_block(kind, config, scheme, inputs, quantized_inputs):
    """The quantized block, how to run it, and the float block that it was."""
    module, run = make_block(kind)
    float_module = copy.deepcopy(module)
    schemes = {name: scheme for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    BlockSearch(module, schemes, run, config).search(inputs, quantized_inputs)
    return module, run, float_module


def residual_streams(module, run, inputs):
    """What attention's output is added to and what the MLP's is added to, float32 [tokens, width], by the linear."""
    outputs: list[torch.Tensor] = []
    handle = module.self_attn.register_forward_hook(lambda *args: outputs.append(args[2][0]))
    for x in inputs:
        run(module, x)
    handle.remove()
    after = [x + y for x, y in zip(inputs, outputs, strict=True)]
    attention, mlp = (torch.cat([x.flatten(0, 1) for x in stream]) for stream in (inputs, after))
    return {"self_attn.o_proj": attention, "self_attn.out_proj": attention, "mlp.down_proj": mlp, "mlp.fc2": mlp}


@pytest.mark.parametrize("kind", KINDS)
def test_the_gap_is_that_of_the_residual_stream(kind, monkeypatch):
    found: dict[str, LayerInputs] = {}

    def record(weights, schemes, config, rows, *rest):
        found.update(dict.fromkeys(weights, rows))
        return quantize_linears(weights, schemes, config, rows, *rest)

    monkeypatch.setattr(block_search, "quantize_linears", record)
    inputs = [torch.randn(2, 9, 64), torch.randn(3, 5, 64)]
    quantized_inputs = [x + 0.1 * torch.randn_like(x) for x in inputs]
    module, run, float_module = search_block(kind, FAST, INT4, inputs, quantized_inputs)
    expected, quantized = residual_streams(float_module, run, inputs), residual_streams(module, run, quantized_inputs)
    added = [name for name in found if name in expected]
    assert len(added) == 2
    for name in added:
        torch.testing.assert_close(found[name].residual_gap, expected[name] - quantized[name], atol=1e-5, rtol=1e-4)
    assert all(rows.residual_gap is None for name, rows in found.items() if name not in added)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_preceding_blocks_do_not_add_up(kind):
    """On inputs that were not searched on; the quantized inputs are off by what a linear makes of them, as of a weight."""
    torch.manual_seed(1)
    gap = torch.eye(64) + 0.02 * torch.randn(64, 64)
    seen, unseen = [torch.randn(40, 20, 64)], [torch.randn(20, 20, 64)]
    errors = []
    for config in (FAST, OWN_OUTPUTS):
        module, run, float_module = search_block(kind, config, INT8, seen, [x @ gap for x in seen])
        outputs, expected = [run(module, x @ gap) for x in unseen], [run(float_module, x) for x in unseen]
        errors.append(mean_token_error(outputs, expected))
    assert errors[0] < 0.97 * errors[1]
