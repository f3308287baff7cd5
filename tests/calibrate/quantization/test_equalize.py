"""Equalization does not change the float model's output, and moves planted outliers out of activations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import get_linear, load_block, make_blocks
from qvlm_export.calibrate.blockwise.shared_inputs import (
    ChannelSharing,
    SharedInput,
    find_channel_sharing,
    find_shared_inputs,
)
from qvlm_export.calibrate.calibrators.block_search import BlockSearch, _find_deciding_scheme
from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.quantization.config import LinearConfig, SearchConfig
from qvlm_export.calibrate.quantization.equalize import apply_equalization_, gather_inputs, search_factors
from qvlm_export.checkpoints.checkpoint import open_checkpoint

INT4 = LinearScheme(weight_bits=4, activation_bits=None, group_size=64)


def block_and_inputs(folder, kind):
    """A block, its input [B, tokens, width], a function that runs it, and the checkpoint's tensors."""
    opened = open_checkpoint(str(folder))
    blocks = make_blocks(opened.hf_config)
    generator = torch.Generator().manual_seed(0)
    if kind == "vision":
        x = torch.randn(2, 37, 128, generator=generator)
        return blocks.vision_layers[1], x, lambda module, h: module(h, attention_mask=None), opened.source
    x = torch.randn(1, 23, 256, generator=generator)
    positions = torch.arange(23)[None]
    rope = blocks.rotary(x, position_ids=positions)
    block = blocks.text_layers[1]
    return block, x, lambda module, h: module(h, attention_mask=None, position_embeddings=rope), opened.source


@pytest.mark.parametrize("kind", ["vision", "language", "language, full attention"])
def test_any_factors_leave_the_float_block_unchanged(llava, kind):
    folder = llava(dtype="float32", kv_heads=4 if "full" in kind else 2)
    block, x, run, source = block_and_inputs(folder, kind.split(",")[0])
    with load_block(block, source) as module, torch.inference_mode():
        before = run(module, x).double()
        shared_inputs = find_shared_inputs(module)
        assert len(shared_inputs) == 4
        for number, shared_input in enumerate(shared_inputs):
            sharing = find_channel_sharing(module, shared_input)
            width = get_linear(module, shared_input.linears[0]).in_features // sharing.copies
            generator = torch.Generator().manual_seed(number)
            apply_equalization_(module, shared_input, torch.exp(torch.randn(width, generator=generator)))
        after = run(module, x).double()
    assert float((after - before).norm() / before.norm()) < 1e-6


def test_a_gain_that_would_not_fit_float16_is_not_divided(llava):
    """Divided by its factor, it would become infinite, or 0, which loses its channel."""
    block, x, run, source = block_and_inputs(llava(dtype="float32"), "language")
    with load_block(block, source) as module, torch.inference_mode():
        norm = module.input_layernorm.weight
        norm[3], norm[5] = 4000.0, 1e-6
        for name in ("q_proj", "k_proj", "v_proj"):  # as if a model had been trained so
            get_linear(module, f"self_attn.{name}").weight[:, 3] /= 4000.0
        before = run(module, x).double()
        factors = torch.ones(256)
        factors[3], factors[5], factors[7] = 1 / 256, 256.0, 2.0
        used = apply_equalization_(module, find_shared_inputs(module)[0], factors)
        after = run(module, x).double()
    assert used[[3, 7]].tolist() == [1.0, 2.0]
    assert float(used[5]) == pytest.approx(1.0, rel=0.05)  # the gain is not divided, only rounded
    assert norm.isfinite().all()
    assert float((after - before).norm() / before.norm()) < 1e-6


def test_equalization_is_chosen_for_the_linears_with_the_fewest_bits():
    """Linears that share the input but stay float or have more bits are only multiplied by the factors."""
    shared_input = SharedInput(("q", "k", "v"), "input_layernorm")
    assert _find_deciding_scheme(shared_input, {"q": INT4, "k": W8A8, "v": INT4}) == (W8A8, ["k"])
    assert _find_deciding_scheme(shared_input, {"q": INT4, "v": LinearScheme(3, None, 64)}) == (
        LinearScheme(3, None, 64),
        ["v"],
    )
    assert _find_deciding_scheme(shared_input, {"v": INT4}) == (INT4, ["v"])


def test_equalization_works_if_only_some_linears_of_a_shared_input_are_quantized():
    """Only q is quantized: its outlier channel is equalized, and the outputs of k and v do not change."""
    module = nn.Module()
    module.input_layernorm, module.self_attn = nn.LayerNorm(64), nn.Module()
    torch.manual_seed(0)
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(module.self_attn, name, nn.Linear(64, 32))
    inputs = [torch.randn(4, 10, 64)]
    errors = []
    with torch.no_grad():
        module.input_layernorm.weight[7] *= 64
        module.self_attn.q_proj.weight[:, 7] /= 64
        for equalization in ("none", "expected"):
            candidate = copy.deepcopy(module)
            config = SearchConfig(equalization, LinearConfig(activation_ranges="absmax", ridge=None))

            def run(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
                hidden = part.input_layernorm(x)
                return torch.cat([getattr(part.self_attn, name)(hidden) for name in ("q_proj", "k_proj", "v_proj")], -1)

            search = BlockSearch(candidate, {"self_attn.q_proj": W8A8}, run, config, strict=True)
            float_outputs, outputs = search.search(inputs, inputs)
            pairs = zip(float_outputs[0].split(32, -1), outputs[0].split(32, -1), strict=True)
            errors.append([float((a - b).norm() / a.norm()) for a, b in pairs])
    assert errors[1][0] < 0.3 * errors[0][0]
    assert max(errors[1][1:]) < 1e-6


def test_query_heads_that_share_a_value_head_share_factors():
    sharing = ChannelSharing(copies=2, head_dim=3)
    per_input = torch.tensor([1.0, 2, 3, 7, 1, 1, 4, 5, 6, 1, 9, 1])  # heads 0 and 1 read value head 0
    assert sharing.reduce(per_input).tolist() == [7, 2, 3, 4, 9, 6]
    assert sharing.expand(torch.arange(6.0)).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]


@pytest.mark.parametrize("scheme", [INT4, W8A8], ids=["int4", "int8"])
def test_planted_outlier_channels_are_equalized(scheme):
    generator = torch.Generator().manual_seed(1)
    inputs, weight = torch.randn(300, 128, generator=generator), torch.randn(64, 128, generator=generator) * 0.05
    inputs[:, 7] *= 64
    weight[:, 7] /= 64
    factors = search_factors(gather_inputs(inputs, torch.arange(len(inputs))), weight, scheme, ChannelSharing())
    others = torch.cat([factors[:7], factors[8:]])
    assert float(factors[7] / others.median()) > 8


def test_only_the_inputs_of_fc2_have_no_preceding_layer(llava):
    folder = llava(dtype="float32")
    block, _, _, source = block_and_inputs(folder, "vision")
    with load_block(block, source) as module, torch.inference_mode():
        names = [shared.linears for shared in find_shared_inputs(module) if shared.preceding is None]
        assert names == [("mlp.fc2",)]
