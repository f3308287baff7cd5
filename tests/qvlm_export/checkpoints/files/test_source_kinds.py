"""Checkpoints that hold no plain float model are named for what they are, with what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import assert_refused, copy_checkpoint, export_onnx, put
from safetensors.torch import load_file, save_file

from qvlm_export.checkpoints.files.source_kinds import QUANTIZATIONS, explain_names

Llava = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
Q_PROJ = "language_model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("section", "key", "described", "words"),
    [
        ("", "quantization_config", {"quant_method": "awq", "bits": 4}, ["AWQ, 4 bits"]),
        ("", "quantization_config", {"quant_method": "gptq", "bits": 4, "desc_act": True}, ["GPTQ, 4 bits"]),
        ("", "quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, ["bitsandbytes, 4 bits"]),
        ("", "quantization_config", {"quant_method": "fp8"}, ["FP8"]),
        ("", "quantization_config", {"quant_method": "compressed-tensors"}, ["compressed-tensors"]),
        ("", "quantization_config", {"quant_method": "made up"}, ["made up"]),
        ("", "compression_config", {"format": "pack-quantized"}, ["compressed-tensors"]),
        ("", "quantization", {"bits": 4, "group_size": 64}, ["MLX, 4 bits"]),
        ("text_config", "quantization_config", {"quant_method": "awq"}, ["AWQ"]),
    ],
)
def test_a_quantized_model_is_named_by_its_config(
    llava: Llava, absent: Path, tmp_path: Path, *, section: str, key: str, described: dict[str, Any], words: list[str]
) -> None:
    model = copy_checkpoint(llava(), tmp_path / "checkpoint", put(section, key, described))
    assert_refused(export_onnx(model, absent), "quantized already", *words, "give the float16 or bfloat16 checkpoint", key)


@pytest.mark.parametrize("value", [None, {}])
def test_an_empty_key_is_no_quantization(llava: Llava, absent: Path, tmp_path: Path, value: object) -> None:
    model = copy_checkpoint(llava(), tmp_path / "checkpoint", put("", "quantization_config", value))
    assert export_onnx(model, absent, "--dry-run").exit_code == 0


def rename(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def swap(suffix: str, dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    """Replaces the weight of one linear by a tensor of another name and type."""

    def edit(tensors: Tensors) -> Tensors:
        weight = tensors.pop(f"{Q_PROJ}.weight")
        return {**tensors, f"{Q_PROJ}{suffix}": torch.zeros(weight.shape[0], 8, dtype=dtype)}

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (rename(lambda name: f"module.{name}"), ["module.", "DataParallel", "save model.module"]),
        (rename(lambda name: f"_orig_mod.{name}"), ["_orig_mod.", "torch.compile", "save model._orig_mod"]),
        (rename(lambda name: name.replace("language_model.", "language_model._orig_mod.")), ["_orig_mod.", "torch.compile"]),
        (rename(lambda name: f"_fsdp_wrapped_module.{name}"), ["_fsdp_wrapped_module.", "FullyShardedDataParallel"]),
        (rename(lambda name: f"base_model.model.{name}"), ["base_model.model.", "PEFT", "merge_and_unload"]),
        (rename(lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight")), ["adapter (LoRA)", "not merged"]),
        (swap(".qweight", torch.int32), ["GPTQ or AWQ weights", "float16 or bfloat16 checkpoint"]),
        (swap(".weight_packed", torch.int32), ["packed compressed-tensors weights"]),
        (swap(".absmax", torch.float32), ["bitsandbytes weights"]),
        (swap(".other", torch.float32), ["lacks the tensor", "the checkpoint is incomplete"]),
    ],
)
def test_names_of_tensors_tell_what_they_are(
    llava: Llava, absent: Path, tmp_path: Path, edit: Callable[[Tensors], Tensors], words: list[str]
) -> None:
    model = copy_checkpoint(llava(), tmp_path / "checkpoint")
    path = model / "model.safetensors"
    save_file(edit(load_file(path)), path, {"format": "pt"})
    assert_refused(export_onnx(model, absent), str(model), *words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adapter_config.json", ["a LoRA adapter (adapter_config.json)", "merge it into its base model"]),
        ("non_lora_trainables.bin", ["a LoRA adapter", "merge it"]),
        ("mm_projector.bin", ["a pretrained projector alone"]),
        ("zero_to_fp32.py", ["DeepSpeed ZeRO", "run its zero_to_fp32.py"]),
        ("consolidated.safetensors", ["Mistral's format"]),
        ("llava-q4_k_m.gguf", ["GGUF weights", "(llava-q4_k_m.gguf)", "float16 or bfloat16 checkpoint"]),
        ("__0_0.distcp", ["a distributed checkpoint of torch"]),
    ],
)
@pytest.mark.parametrize("config", [True, False], ids=["with config.json", "without config.json"])
def test_a_folder_without_a_model_is_named_for_what_it_holds(
    llava: Llava, absent: Path, tmp_path: Path, *, name: str, words: list[str], config: bool
) -> None:
    model = copy_checkpoint(llava(), tmp_path / "checkpoint")
    (model / "model.safetensors").unlink()
    (model / name).write_text("{}")
    if not config:
        (model / "config.json").unlink()
    assert_refused(export_onnx(model, absent), str(model), *words)


def test_an_adapter_beside_whole_weights_is_refused(llava: Llava, absent: Path, tmp_path: Path) -> None:
    model = copy_checkpoint(llava(), tmp_path / "checkpoint")
    (model / "adapter_config.json").write_text("{}")
    assert_refused(export_onnx(model, absent), "transformers would add an adapter", "or remove the file")


def test_plain_names_need_no_explanation() -> None:
    assert explain_names(["language_model.model.layers.0.mlp.up_proj.weight", "module_list.weight"]) is None
    assert explain_names([]) is None
    assert all(name == name.lower() for name in QUANTIZATIONS)
