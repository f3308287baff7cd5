"""The model as blocks: which layers run, which linears can be quantized, and that weights are loaded only while needed."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from small_export import make_sample, module_of, open_small
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from qvlm_export.calibrate.blockwise.blocks import feature_layers, load_block, make_blocks
from qvlm_export.calibrate.errors import UserError

FEATURES = pytest.mark.parametrize("feature", [-2, -1, -3, 1, 4])


@pytest.mark.parametrize("feature", [-5, -2, -1, 0, 1, 4])
def test_the_feature_is_the_output_of_the_last_layer_that_runs(feature):
    config = LlavaConfig(vision_config=CLIPVisionConfig(num_hidden_layers=4), vision_feature_layer=feature)
    # transformers indexes a list that begins with the embeddings, so the place in it is the number of layers run.
    assert feature_layers(config) == (list(range(5))[feature],)


@FEATURES
def test_exactly_the_linears_that_reach_the_logits_are_quantizable(llava, feature):
    checkpoint = open_small(llava(vision_feature_layer=feature))
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=torch.float32)
    sample = make_sample(checkpoint, words=5, images=1, seed=0)
    pixels = torch.from_numpy(sample.pixel_values)
    model(input_ids=torch.from_numpy(sample.input_ids)[None], pixel_values=pixels).logits.sum().backward()
    with_gradient = {m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight.grad is not None}
    names = make_blocks(checkpoint.hf_config).quantizable()
    assert len(names) == len(set(names))
    assert {module_of(model, name) for name in names} == with_gradient - {model.lm_head}


@FEATURES
def test_vision_layers_after_the_feature_are_left_out(llava, feature):
    blocks = make_blocks(open_small(llava(vision_feature_layer=feature)).hf_config)
    num_layers = list(range(5))[feature]
    assert [b.prefix for b in blocks.vision_layers] == [
        f"vision_tower.vision_model.encoder.layers.{i}" for i in range(num_layers)
    ]
    assert blocks.num_blocks() == num_layers + 1 + 2
    assert not any("lm_head" in name for name in blocks.quantizable())


def test_linears_are_listed_block_by_block_in_the_order_they_run(llava):
    blocks = make_blocks(open_small(llava()).hf_config)
    parents = [re.sub(r"\.(self_attn\.|mlp\.)?\w+$", "", name) for name in blocks.quantizable()]
    assert list(dict.fromkeys(parents)) == [
        *(f"vision_tower.vision_model.encoder.layers.{i}" for i in range(3)),
        "multi_modal_projector",
        *(f"language_model.model.layers.{i}" for i in range(2)),
    ]
    assert len(parents) == 3 * 6 + 2 + 2 * 7


def test_new_blocks_are_on_the_meta_device(llava):
    blocks = make_blocks(open_small(llava()).hf_config)
    all_blocks = (*blocks.entries, *blocks.all())
    assert {p.device.type for block in all_blocks for p in block.module.parameters()} == {"meta"}


def test_tensor_names_of_blocks_are_tensors_of_the_checkpoint(llava):
    checkpoint = open_small(llava())
    blocks = make_blocks(checkpoint.hf_config)
    all_blocks = (*blocks.entries, *blocks.all())
    for block in all_blocks:
        for name in block.tensor_names():
            assert checkpoint.source.shape(name) == tuple(block.module.get_parameter(name[len(block.prefix) + 1 :]).shape)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_in_memory_only_while_a_block_is_loaded(llava, dtype):
    checkpoint = open_small(llava(dtype=dtype))
    block = make_blocks(checkpoint.hf_config).text_layers[1]
    with load_block(block, checkpoint.source) as module:
        for name, parameter in module.named_parameters():
            assert parameter.dtype == torch.float32
            expected = checkpoint.source.load(f"{block.prefix}.{name}").astype(np.float32)
            np.testing.assert_array_equal(parameter.numpy(), expected)
    assert {p.device.type for p in block.module.parameters()} == {"meta"}
    with load_block(block, checkpoint.source) as module:
        assert {p.device.type for p in module.parameters()} == {"cpu"}


def test_loading_the_vision_embeddings_restores_their_position_ids(llava):
    checkpoint = open_small(llava())
    block = make_blocks(checkpoint.hf_config).entries[0]
    with load_block(block, checkpoint.source) as module:
        assert module.position_ids.tolist() == [list(range(37))]
    assert {t.device.type for t in (*block.module.parameters(), *block.module.buffers())} == {"meta"}


def test_weights_are_released_when_an_error_is_raised_inside(llava):
    checkpoint = open_small(llava())
    block = make_blocks(checkpoint.hf_config).projector
    with pytest.raises(UserError, match="on purpose"), load_block(block, checkpoint.source):
        raise UserError("on purpose")
    assert {p.device.type for p in block.module.parameters()} == {"meta"}
