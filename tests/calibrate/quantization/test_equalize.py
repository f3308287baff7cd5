"""Folding changes no output of the float model, and takes planted outliers out of activations."""

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
from qvlm_export.calibrate.calibrators.block_search import BlockSearch, _deciding
from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.quantization.config import LinearConfig, SearchConfig
from qvlm_export.calibrate.quantization.equalize import apply_equalization_, gather_inputs, search_factors
from qvlm_export.checkpoints.checkpoint import open_checkpoint

INT4 = LinearScheme(weight_bits=4, activation_bits=None, group_size=64)


def block_and_inputs(folder, kind):
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
        groups = find_shared_inputs(module)
        assert len(groups) == 4
        for number, group in enumerate(groups):
            sharing = find_channel_sharing(module, group)
            width = get_linear(module, group.linears[0]).in_features // sharing.copies
            generator = torch.Generator().manual_seed(number)
            apply_equalization_(module, group, torch.exp(torch.randn(width, generator=generator)))
        after = run(module, x).double()
    assert float((after - before).norm() / before.norm()) < 1e-6


def test_a_gain_that_float16_cannot_hold_stays(llava):
    """Divided, it would be infinite, or 0 and its channel lost."""
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
    assert float(used[5]) == pytest.approx(1.0, rel=0.05)  # it is rounded, if not divided
    assert norm.isfinite().all()
    assert float((after - before).norm() / before.norm()) < 1e-6


def test_the_linears_of_fewest_bits_decide():
    """Where others of the group stay float or keep more bits, they are multiplied along."""
    group = SharedInput(("q", "k", "v"), "input_layernorm")
    assert _deciding(group, {"q": INT4, "k": W8A8, "v": INT4}) == (W8A8, ["k"])
    assert _deciding(group, {"q": INT4, "v": LinearScheme(3, None, 64)}) == (LinearScheme(3, None, 64), ["v"])
    assert _deciding(group, {"v": INT4}) == (INT4, ["v"])


def test_a_group_that_is_quantized_in_part_is_folded():
    """q alone is planned: its outlier channel is folded, and k computes what it did."""
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
        for folding in ("none", "expected"):
            own = copy.deepcopy(module)
            method = SearchConfig(folding, LinearConfig(activation_ranges="absmax", ridge=None))

            def run(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
                read = part.input_layernorm(x)
                return torch.cat([getattr(part.self_attn, name)(read) for name in ("q_proj", "k_proj", "v_proj")], -1)

            search = BlockSearch(own, {"self_attn.q_proj": W8A8}, run, method)
            wanted, found = search.search(inputs, inputs)
            pairs = zip(wanted[0].split(32, -1), found[0].split(32, -1), strict=True)
            errors.append([float((a - b).norm() / a.norm()) for a, b in pairs])
    assert errors[1][0] < 0.3 * errors[0][0]
    assert max(errors[1][1:]) < 1e-6


def test_grouped_query_heads_share_factors():
    sharing = ChannelSharing(copies=2, head_dim=3)
    per_input = torch.tensor([1.0, 2, 3, 7, 1, 1, 4, 5, 6, 1, 9, 1])  # heads 0 and 1 read value head 0
    assert sharing.reduce(per_input).tolist() == [7, 2, 3, 4, 9, 6]
    assert sharing.expand(torch.arange(6.0)).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]


@pytest.mark.parametrize("scheme", [INT4, W8A8], ids=["int4", "int8"])
def test_planted_outlier_channels_are_taken_out(scheme):
    generator = torch.Generator().manual_seed(1)
    inputs, weight = torch.randn(300, 128, generator=generator), torch.randn(64, 128, generator=generator) * 0.05
    inputs[:, 7] *= 64
    weight[:, 7] /= 64
    factors = search_factors(gather_inputs(inputs, torch.arange(len(inputs))), weight, scheme, ChannelSharing())
    others = torch.cat([factors[:7], factors[8:]])
    assert float(factors[7] / others.median()) > 8


def test_fold_needs_a_producer(llava):
    folder = llava(dtype="float32")
    block, _, _, source = block_and_inputs(folder, "vision")
    with load_block(block, source) as module, torch.inference_mode():
        names = [group.linears for group in find_shared_inputs(module) if group.preceding is None]
        assert names == [("mlp.fc2",)]
