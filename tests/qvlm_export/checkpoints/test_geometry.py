"""What a model computes comes from transformers' modules, not from keys of config.json that they ignore."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from commands import Edit, assert_refused, copy_checkpoint, export_onnx, put
from logits import exported_logits, reference_logits, relative_l2
from torch import nn
from transformers import LlamaConfig, MistralConfig, Qwen2Config, VipLlavaConfig
from transformers.activations import ACT2FN

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.float_model import attention_window, declared
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints import geometry
from qvlm_export.checkpoints.checkpoint import open_checkpoint
from qvlm_export.checkpoints.families import find_layout
from qvlm_export.checkpoints.geometry import activation_name, norm_epsilon, rope
from qvlm_export.engines.config import Activation
from qvlm_export.engines.graph.layers import ACTIVATIONS

Llava = Callable[..., Path]
FLOAT16_GRAPH = 0.01  # relative error of the logits of a float16 graph; another model is off by more than 0.1
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def test_every_activation_of_the_configuration_has_a_graph_and_a_probe() -> None:
    assert set(get_args(Activation)) == set(ACTIVATIONS) == set(geometry._FUNCTIONS)


def put_all(section: str, **values: object) -> Edit:
    """An edit of config.json that sets several keys of a section."""
    return lambda config: (config[section] if section else config).update(values)


@pytest.mark.parametrize(
    "edit",
    [
        put("text_config", "sliding_window", 24),
        put_all("text_config", sliding_window=24, layer_types=["sliding_attention"] * 2, use_sliding_window=True),
        put_all("text_config", qkv_bias=True, use_qkv_bias=True, attention_multiplier=9.0, residual_multiplier=0.1),
        put_all("text_config", logit_scale=0.1, final_logit_softcapping=1.0, attn_logit_softcapping=1.0),
        put("text_config", "partial_rotary_factor", 0.5),
        put("text_config", "rope_parameters", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        put("text_config", "rope_parameters", {"rope_type": "linear", "factor": 1.0, "rope_theta": 1e4}),
        put("text_config", "rope_parameters", {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
        put("text_config", "rope_scaling", {"type": "linear", "factor": 3.0}),
        put("text_config", "rope_parameters", LLAMA3),
        put("text_config", "rope_parameters", YARN),
        put("text_config", "rope_parameters", {**YARN, "attention_factor": 1.5}),
        put("text_config", "hidden_act", "gelu_new"),
        put("vision_config", "hidden_act", "gelu"),
        put("vision_config", "hidden_act", "swish"),
        put("", "projector_hidden_act", "linear"),
        put("", "projector_hidden_act", "gelu_pytorch_tanh"),
        put_all("", mm_vision_tower="openai/clip-vit-large-patch14", mm_projector_type="linear", mm_hidden_size=1024),
        put_all("vision_config", layer_norm_eps=1e-2),
        put_all("text_config", rms_norm_eps=1e-2),
    ],
)
def test_llama_with_other_keys_has_the_logits_of_transformers(llava: Llava, tmp_path: Path, edit: Edit) -> None:
    model = copy_checkpoint(llava(), tmp_path / "checkpoint", edit)
    assert relative_l2(exported_logits(model, tmp_path), reference_logits(model)) < FLOAT16_GRAPH


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mistral", {"sliding_window": 24}),
        ("mistral", {"sliding_window": None, "attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 24, "layer_types": ["full_attention"] * 2, "use_sliding_window": False}),
        ("qwen2", {"sliding_window": 24, "use_sliding_window": False}),
        ("qwen2", {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 0, "layer_types": None}),
        ("qwen2", {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 28, "layer_types": None}),
        ("qwen2", {"attention_bias": False, "mlp_bias": True, "head_dim": 64}),
    ],
)
def test_decoders_with_other_keys_have_the_logits_of_transformers(
    llava: Llava, tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["text_config"] |= {"model_type": model_type, **changes}

    has_bias = {"text": {"attention_bias": True}} if model_type == "qwen2" else {}
    model = copy_checkpoint(llava(**has_bias), tmp_path / "checkpoint", edit)
    assert relative_l2(exported_logits(model, tmp_path), reference_logits(model)) < FLOAT16_GRAPH


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            put_all("text_config", model_type="qwen2", use_sliding_window=True, sliding_window=24, max_window_layers=1,
                    layer_types=None),
            ["layers with full attention and a sliding window of 24", "one kind"],
        ),
        (
            put_all("text_config", model_type="qwen2", layer_types=["chunked_attention"] * 2),
            ["transformers cannot", "chunked_attention"],
        ),
        (put_all("text_config", model_type="mistral", sliding_window=0), ["text_config.sliding_window is 0"]),
        (put_all("text_config", model_type="mistral", sliding_window=-3), ["text_config.sliding_window is -3"]),
        (
            put("text_config", "rope_parameters", {**LLAMA3, "partial_rotary_factor": 0.5}),
            ["text_config.rope_parameters", "'partial_rotary_factor': 0.5", "all 64 channels"],
        ),
        (put("text_config", "rope_parameters", {"rope_type": "default", "rope_theta": 0.0}), ["rope_parameters", "finite"]),
        (put("text_config", "rope_parameters", {"rope_type": "default", "rope_theta": float("nan")}), ["rope_parameters"]),
        (put("text_config", "rope_parameters", {"rope_type": "linear", "factor": 0, "rope_theta": 1}), ["rope_parameters"]),
        (put("text_config", "rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}), ["factor"]),
        (put("text_config", "rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}), ["spiral"]),
        (
            put("text_config", "rope_parameters",
                {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
                 "short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "factor": 2.0}),
            ["text_config.rope_parameters", "do not change up to max_position_embeddings"],
        ),
        (put("text_config", "rms_norm_eps", float("nan")), ["text_config.rms_norm_eps is nan", "not negative"]),
        (put("text_config", "rms_norm_eps", -1.0), ["text_config.rms_norm_eps is -1.0"]),
        (put("text_config", "rms_norm_eps", float("inf")), ["text_config.rms_norm_eps is inf"]),
        (put("vision_config", "layer_norm_eps", float("nan")), ["vision_config.layer_norm_eps is nan"]),
        (put("text_config", "num_hidden_layers", 10**9), ["text_config.num_hidden_layers is 1000000000", "from 1 to 1000"]),
        (put("vision_config", "num_hidden_layers", 10**9), ["vision_config.num_hidden_layers is 1000000000"]),
        (put("text_config", "vocab_size", 2**62), ["text_config.vocab_size"]),
        (put("text_config", "hidden_act", "relu"), ["text_config.hidden_act is 'relu'", "silu"]),
        (put("text_config", "hidden_act", "no such"), ["transformers cannot", "no such"]),
        (put("text_config", "hidden_act", "xielu"), ["text_config.hidden_act is 'xielu'"]),
        (put("text_config", "is_causal", False), ["text_config.is_causal is False", "attend backwards"]),
        (put("text_config", "is_causal", 0), ["text_config.is_causal is 0"]),
        (put("vision_config", "is_causal", True), ["vision_config.is_causal is True", "patches see each other"]),
        (
            put("text_config", "rope_parameters", {"rope_type": "linear", "factor": -2.0, "rope_theta": 1e4}),
            ["text_config.rope_parameters", "finite"],
        ),
    ],
)  # fmt: skip
def test_what_the_graphs_cannot_express_is_refused(
    llava: Llava, absent: Path, tmp_path: Path, edit: Edit, words: list[str]
) -> None:
    model = copy_checkpoint(llava(), tmp_path / "checkpoint", edit)
    assert_refused(export_onnx(model, absent), str(model / "config.json"), *words)


def test_the_blocks_obey_the_same_window(llava: Llava, tmp_path: Path) -> None:
    ignored = copy_checkpoint(llava(), tmp_path / "llama", put("text_config", "sliding_window", 24))
    assert make_blocks(open_checkpoint(str(ignored)).hf_config).sliding_window is None
    obeyed = copy_checkpoint(llava(), tmp_path / "mistral", put_all("text_config", model_type="mistral", sliding_window=24))
    assert make_blocks(open_checkpoint(str(obeyed)).hf_config).sliding_window == 24


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["flash_attention_2", "kernels-community/x", {"text_config": "flash_attention_2"}, 3])
def test_a_choice_of_attention_kernels_loads_nothing(llava: Llava, tmp_path: Path, key: str, value: object) -> None:
    model = copy_checkpoint(llava(), tmp_path / "checkpoint", put("", key, value))
    assert open_checkpoint(str(model)).config == open_checkpoint(str(llava())).config


def test_a_window_beyond_all_positions_is_none() -> None:
    assert attention_window(MistralConfig(num_hidden_layers=2, sliding_window=2**40)) is None


@pytest.mark.parametrize(("kind", "window"), [(LlamaConfig, None), (MistralConfig, 7), (Qwen2Config, None)])
def test_a_window_is_one_only_where_the_class_has_one(kind: type[LlamaConfig], window: int | None) -> None:
    assert attention_window(kind(num_hidden_layers=3, sliding_window=7)) == window


def test_leftover_keys_of_the_whole_model_do_not_count() -> None:
    config = VipLlavaConfig(vision_feature_select_strategy="full")
    assert config.vision_feature_select_strategy == "full"
    assert declared(config, "vision_feature_select_strategy", "default") == "default"


def test_a_conversion_may_leave_keys_of_the_authors_layout() -> None:
    assert find_layout({"mm_vision_tower": "x"}).name == "authors"
    assert find_layout({"mm_vision_tower": "x", "text_config": {}}).name == "transformers"


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("swish", "silu"), ("silu", "silu"), ("gelu_new", "gelu_pytorch_tanh"), ("gelu_fast", "gelu_pytorch_tanh"),
        ("gelu_python", "gelu"), ("quick_gelu", "quick_gelu"), ("linear", "linear"),
    ],
)  # fmt: skip
def test_activations_are_known_by_what_they_compute(alias: str, name: str) -> None:
    assert activation_name(ACT2FN[alias], "here", "key", alias) == name


@pytest.mark.parametrize("alias", ["relu", "mish", "gelu_10", "tanh", "sigmoid", "relu2"])
def test_other_activations_are_refused(alias: str) -> None:
    with pytest.raises(UserError, match=f"here: key is '{alias}'"):
        activation_name(ACT2FN[alias], "here", "key", alias)


def test_norms_of_different_epsilons_are_refused() -> None:
    assert norm_epsilon([nn.LayerNorm(2, eps=1e-3), nn.LayerNorm(2, eps=1e-3)], "here", "key") == 1e-3
    with pytest.raises(UserError, match=r"key is \[0.001, 1e-05\]"):
        norm_epsilon([nn.LayerNorm(2, eps=1e-3), nn.LayerNorm(2)], "here", "key")


def test_rotary_frequencies_are_those_of_transformers(llava: Llava, tmp_path: Path) -> None:
    model = copy_checkpoint(llava(), tmp_path / "checkpoint", put("text_config", "rope_parameters", YARN))
    checkpoint = open_checkpoint(str(model))
    rotary = make_blocks(checkpoint.hf_config).rotary
    frequencies, scale = rope(rotary, 64, 64, "here")
    assert checkpoint.config.text.rope_frequencies == frequencies == tuple(rotary.inv_freq.tolist())
    assert checkpoint.config.text.rope_scale == scale > 1
    cos, _ = rotary(torch.zeros(1), torch.tensor([[5]]))
    assert torch.allclose(cos[0, 0, :32], (5 * torch.tensor(frequencies)).cos() * scale, atol=1e-6)
