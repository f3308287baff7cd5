"""Folding changes no output of the float model, and takes planted outliers out of activations."""

from __future__ import annotations

import pytest
import torch

from calibrate.blocks import linear_of, make_blocks, resident
from calibrate.fold import Sharing, apply_factors_, groups_of, inputs_of, search_factors, sharing_of
from calibrate.scheme import W8A8, LinearScheme
from qvlm_export.checkpoint import open_checkpoint

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
    with resident(block, source) as module, torch.inference_mode():
        before = run(module, x).double()
        groups = groups_of(module)
        assert len(groups) == 4
        for number, group in enumerate(groups):
            sharing = sharing_of(module, group)
            width = linear_of(module, group.linears[0]).in_features // sharing.copies
            generator = torch.Generator().manual_seed(number)
            apply_factors_(module, group, torch.exp(torch.randn(width, generator=generator)))
        after = run(module, x).double()
    assert float((after - before).norm() / before.norm()) < 1e-6


def test_grouped_query_heads_share_factors():
    sharing = Sharing(copies=2, head_dim=3)
    per_input = torch.tensor([1.0, 2, 3, 7, 1, 1, 4, 5, 6, 1, 9, 1])  # heads 0 and 1 read value head 0
    assert sharing.reduced(per_input).tolist() == [7, 2, 3, 4, 9, 6]
    assert sharing.expanded(torch.arange(6.0)).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]


@pytest.mark.parametrize("scheme", [INT4, W8A8], ids=["int4", "int8"])
def test_planted_outlier_channels_are_taken_out(scheme):
    generator = torch.Generator().manual_seed(1)
    inputs, weight = torch.randn(300, 128, generator=generator), torch.randn(64, 128, generator=generator) * 0.05
    inputs[:, 7] *= 64
    weight[:, 7] /= 64
    factors = search_factors(inputs_of(inputs, torch.arange(len(inputs))), weight, scheme, Sharing())
    others = torch.cat([factors[:7], factors[8:]])
    assert float(factors[7] / others.median()) > 8


def test_fold_needs_a_producer(llava):
    folder = llava(dtype="float32")
    block, _, _, source = block_and_inputs(folder, "vision")
    with resident(block, source) as module, torch.inference_mode():
        names = [group.linears for group in groups_of(module) if group.producer is None]
        assert names == [("mlp.fc2",)]
