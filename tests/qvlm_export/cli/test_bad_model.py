"""Damaged, incomplete and unsupported checkpoints: one line on stderr, exit code 2, and nothing written."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Edit, assert_refused, copy_checkpoint, export_onnx, put, set_weight
from safetensors.numpy import load_file, save_file

Llava = Callable[..., Path]
UP_PROJ = "language_model.model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def checkpoint(llava: Llava, tmp_path: Path) -> Path:
    """An intact checkpoint that may be damaged."""
    return copy_checkpoint(llava(), tmp_path / "checkpoint")


# config.json


@pytest.mark.parametrize("model", ["llava-70b", "./no/such", "~/no-such-folder", "a/b/c"])
def test_unknown_model_is_refused(absent: Path, model: str) -> None:
    assert_refused(export_onnx(model, absent), "no such folder", "see --list-models", "Hugging Face id")


def test_model_is_a_file(absent: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    assert_refused(export_onnx(tmp_path / "model.gguf", absent), "is a file", "folder")


def test_model_is_an_empty_folder(absent: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(export_onnx(tmp_path / "empty", absent), "no config.json", "give the folder of a LLaVA")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["not readable as JSON", "download it again"]),
        ("[" * 100_000, ["not readable as JSON"]),
        ("[1, 2]", ["no JSON object"]),
        ("null", ["no JSON object"]),
        ('{"model_type": "bert"}', ["model_type is 'bert'", "supported: llava (", "llava_onevision (LLaVA-OneVision)"]),
        (
            '{"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}',
            ["model_type is 'qwen2_5_vl' (Qwen2_5_VLForConditionalGeneration)", "no supported LLaVA"],
        ),
        ("{}", ["model_type is None", "supported: llava"]),
    ],
)
def test_config_is_no_llava(checkpoint: Path, absent: Path, content: str, words: list[str]) -> None:
    (checkpoint / "config.json").write_text(content)
    assert_refused(export_onnx(checkpoint, absent), str(checkpoint / "config.json"), *words)


def test_config_is_not_utf8(checkpoint: Path, absent: Path) -> None:
    (checkpoint / "config.json").write_bytes(b'{"model_type": "\xff"}')
    assert_refused(export_onnx(checkpoint, absent), "config.json", "not readable as JSON")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (put("vision_config", "model_type", "vit"), ["vision_config.model_type is 'vit'", "supports clip", "siglip"]),
        (put("vision_config", "model_type", "siglip_vision_model"), ["vision_feature_select_strategy is 'default'", "full"]),
        (put("text_config", "model_type", "gpt_neox"), ["text_config.model_type is 'gpt_neox'", "supports llama, mistral"]),
        (put("vision_config", "hidden_act", "relu"), ["vision_config.hidden_act is 'relu'", "quick_gelu"]),
        (put("", "projector_hidden_act", "relu6"), ["projector_hidden_act is 'relu6'", "gelu"]),
        (put("text_config", "head_dim", 0), ["text_config.head_dim is 0", "from 1"]),
        (put("", "vision_feature_layer", [-2, -6]), ["vision_feature_layer is [-2, -6]", "layer of the tower"]),
        (put("", "vision_feature_layer", []), ["vision_feature_layer is []", "or several"]),
        (put("", "vision_feature_layer", 9), ["vision_feature_layer is 9", "layer of the tower"]),
        (put("", "vision_feature_layer", 0), ["vision_feature_layer is 0"]),
        (put("", "vision_feature_select_strategy", "cls"), ["vision_feature_select_strategy", "cls"]),
        (put("", "image_token_index", 512), ["image_token_index is 512", "vocab_size 512"]),
        (put("vision_config", "image_size", 50), ["vision_config.image_size is 50", "patch_size 8"]),
        (put("vision_config", "image_size", [48, 48]), ["vision_config.image_size is [48, 48]", "whole numbers"]),
        (put("vision_config", "patch_size", 0), ["vision_config.patch_size is 0", "from 1"]),
        (put("vision_config", "num_channels", 4), ["vision_config.num_channels is 4", "supports 3"]),
        (put("vision_config", "num_attention_heads", 3), ["attention heads (3)"]),
        (put("text_config", "num_attention_heads", 0), ["not a valid configuration", "by zero"]),
        (put("text_config", "num_key_value_heads", 3), ["text_config.num_key_value_heads is 3", "4 heads"]),
        (put("text_config", "num_hidden_layers", -1), ["text_config.num_hidden_layers is -1", "from 1"]),
        (put("text_config", "head_dim", 63), ["not a valid configuration", "even", "`head_dim`=63"]),
        (put("text_config", "pad_token_id", 10**6), ["text_config.pad_token_id is 1000000"]),
        (put("text_config", "hidden_size", "wide"), ["not a valid configuration", "hidden_size", "int"]),
        (put("text_config", "mlp_bias", None), ["not a valid configuration", "mlp_bias"]),
        (put("", "text_config", [1]), ["not a valid configuration", "text_config"]),
    ],
)
def test_config_that_the_graphs_cannot_express_is_refused(
    llava: Llava, absent: Path, tmp_path: Path, edit: Edit, words: list[str]
) -> None:
    model = copy_checkpoint(llava(), tmp_path / "checkpoint", edit)
    assert_refused(export_onnx(model, absent), str(model / "config.json"), *words)


@pytest.mark.parametrize(
    ("edit", "tensor"),
    [
        (put("text_config", "intermediate_size", 768), "language_model.model.layers.0.mlp."),
        (put("text_config", "vocab_size", 640), "language_model.model.embed_tokens.weight"),
        (put("vision_config", "image_size", 56), "vision_tower.vision_model.embeddings.position_embedding.weight"),
    ],
)
def test_shape_contradicts_config(llava: Llava, absent: Path, tmp_path: Path, edit: Edit, tensor: str) -> None:
    model = copy_checkpoint(llava(), tmp_path / "checkpoint", edit)
    assert_refused(export_onnx(model, absent), tensor, "has shape", "config.json says", "do not belong together")


def test_more_layers_in_config_than_in_weights(llava: Llava, absent: Path, tmp_path: Path) -> None:
    model = copy_checkpoint(llava(), tmp_path / "checkpoint", put("text_config", "num_hidden_layers", 3))
    assert_refused(export_onnx(model, absent), "lacks the tensor language_model.model.layers.2.", "incomplete")


def test_no_group_divides_the_hidden_size(llava: Llava, absent: Path) -> None:
    model = llava(text={"hidden_size": 96, "head_dim": 24})
    q_proj = "language_model.model.layers.0.self_attn.q_proj"
    assert_refused(export_onnx(model, absent), q_proj, "128 nor 64 does not divide its 96 inputs", "--scheme int8")
    assert export_onnx(model, absent, "--scheme", "int8", "--dry-run").exit_code == 0


# The weights


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: (2**60).to_bytes(8, "little") + data[8:],
        lambda data: data.replace(b'"dtype":"F16"', b'"dtype":"F17"'),
        lambda data: b"<!DOCTYPE html>" + data,
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    ],
    ids=["empty", "header cut", "one byte short", "one byte long", "huge header", "unknown type", "web page", "LFS"],
)
def test_damaged_safetensors(checkpoint: Path, absent: Path, damage: Callable[[bytes], bytes]) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    assert_refused(export_onnx(checkpoint, absent), f"{weights}: not a readable safetensors file", "download it again")


def test_unsupported_type_of_tensor(checkpoint: Path, absent: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"dtype":"F16"', b'"dtype":"U16"'))
    assert_refused(export_onnx(checkpoint, absent), "has type U16", "give unquantized weights")


def test_quantized_checkpoint(checkpoint: Path, absent: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    save_file(tensors | {UP_PROJ: tensors[UP_PROJ].astype(np.int8)}, checkpoint / "model.safetensors", {"format": "pt"})
    assert_refused(export_onnx(checkpoint, absent), UP_PROJ, "is int8", "unquantized checkpoint")


def test_no_weights(checkpoint: Path, absent: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert_refused(export_onnx(checkpoint, absent), str(checkpoint), "no weights", "model.safetensors")


@pytest.mark.parametrize("name", [UP_PROJ, "vision_tower.pre_layrnorm.bias", "language_model.lm_head.weight"])
def test_missing_tensor(checkpoint: Path, absent: Path, name: str) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[name]
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    canonical = name.replace("vision_tower.", "vision_tower.vision_model.")
    assert_refused(export_onnx(checkpoint, absent), "lacks", canonical)


def test_missing_shard(llava: Llava, absent: Path, tmp_path: Path) -> None:
    model = copy_checkpoint(llava(max_shard_size="1MB"), tmp_path / "checkpoint")
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert_refused(export_onnx(model, absent), f"{shard}: this shard is named by", "missing", "download it")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", ["not a weight index"]),
        ("[]", ["not a weight index"]),
        ("{}", ["not a weight index", "weight_map"]),
        ('{"weight_map": {"a": ["b"]}}', ["not a weight index"]),
        ('{"weight_map": {"a": 1}}', ["names the file 1", "not in this folder"]),
        ('{"weight_map": {"a": "../b.safetensors"}}', ["names the file '../b.safetensors'", "not in this folder"]),
        ('{"weight_map": {"a": "/etc/passwd"}}', ["names the file '/etc/passwd'", "not in this folder"]),
        ('{"weight_map": {}}', ["lacks the tensor", "incomplete"]),
    ],
)
def test_damaged_index(checkpoint: Path, absent: Path, index: str, words: list[str]) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors")  # it would win over an index
    (checkpoint / "model.safetensors.index.json").write_text(index)
    assert_refused(export_onnx(checkpoint, absent), *words)


class Payload:
    """Creates a file when it is unpickled, as code in a pickle can."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ["zip", "zip beside tensors", "before torch 1.6", "bare pickle"])
def test_code_in_a_pickle_does_not_run(checkpoint: Path, absent: Path, tmp_path: Path, form: str) -> None:
    trap, payload = checkpoint / "pytorch_model.bin", Payload(tmp_path / "pwned")
    (checkpoint / "model.safetensors").unlink()
    if form == "bare pickle":
        trap.write_bytes(pickle.dumps(payload))
    else:
        content = {"a": torch.zeros(1), "b": payload} if form == "zip beside tensors" else payload
        torch.save(content, trap, _use_new_zipfile_serialization=form != "before torch 1.6")
    refused = export_onnx(checkpoint, absent)
    assert not payload.path.exists()
    assert_refused(refused, f"{trap}:", "was not opened, as it could run code", "safetensors")


def test_the_payload_would_work(tmp_path: Path) -> None:
    """Otherwise, the test above would prove nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "pwned")))  # noqa: S301
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(1)], ["no dictionary of tensors"]),
        ({"state_dict": {"a": torch.zeros(1)}}, ["'state_dict' is no plain tensor"]),
        ({1: torch.zeros(1)}, ["1 is no plain tensor"]),
        ({"a": torch.eye(3).to_sparse()}, ["'a' is no plain tensor"]),
        ({"a": torch.zeros(3, device="meta")}, ["'a' is no plain tensor"]),
        ({"a": torch.zeros(3)}, ["lacks the tensor", "incomplete"]),
    ],
    ids=["list", "nested", "number for a name", "sparse", "meta", "too few"],
)
def test_torch_file_without_a_model(checkpoint: Path, absent: Path, content: object, words: list[str]) -> None:
    (checkpoint / "model.safetensors").unlink()
    torch.save(content, checkpoint / "pytorch_model.bin")
    assert_refused(export_onnx(checkpoint, absent), *words)


@pytest.mark.parametrize("end", [0, 1000, -1])
def test_truncated_torch_file(checkpoint: Path, absent: Path, end: int) -> None:
    (checkpoint / "model.safetensors").unlink()
    path = checkpoint / "pytorch_model.bin"
    torch.save({"a": torch.zeros(10_000)}, path)
    path.write_bytes(path.read_bytes()[:end])
    assert_refused(export_onnx(checkpoint, absent), f"{path}: not a readable torch checkpoint", "download it again")


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weight_is_not_finite(checkpoint: Path, absent: Path, scheme: str, value: float) -> None:
    set_weight(checkpoint, UP_PROJ, value)
    assert_refused(export_onnx(checkpoint, absent, "--scheme", scheme), f"{UP_PROJ}: holds NaN or infinite values")


@pytest.mark.parametrize("scheme", ["int4", "fp16"])
@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.encoder.layers.0.layer_norm1.bias",
        "vision_tower.embeddings.class_embedding",
        "multi_modal_projector.linear_2.bias",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.input_layernorm.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
    ],
)
def test_small_tensors_that_are_not_finite_are_refused(checkpoint: Path, absent: Path, name: str, scheme: str) -> None:
    set_weight(checkpoint, name, np.nan)
    canonical = name.replace("vision_tower.", "vision_tower.vision_model.")
    assert_refused(export_onnx(checkpoint, absent, "--scheme", scheme), f"{canonical}: holds NaN or infinite values")


def test_weight_beyond_float16(checkpoint: Path, absent: Path) -> None:
    set_weight(checkpoint, UP_PROJ, 1e6, "float32")
    words = ("beyond float16's 65504", "add --dtype bfloat16")
    assert_refused(export_onnx(checkpoint, absent, "--scheme", "fp16"), UP_PROJ.removesuffix(".weight"), *words)
