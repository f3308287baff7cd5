"""Opening checkpoints: formats, tensor names, repositories; exports must have the logits of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from commands import copy_checkpoint
from logits import exported_logits, reference_logits, relative_l2
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from qvlm_export.calibrate.checkpoint.safetensors_source import SafetensorsSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.checkpoint import open_checkpoint
from qvlm_export.checkpoints.families import find_layout, make_renamer
from qvlm_export.checkpoints.files.hub import find_checkpoint
from qvlm_export.checkpoints.files.torch_source import TorchSource
from qvlm_export.checkpoints.files.weights import Location
from qvlm_export.engines.graph.float_graphs import expected_shapes

Llava = Callable[..., Path]
UP_PROJ = "language_model.model.layers.1.mlp.up_proj.weight"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return tensors


def rename_tensors(source: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    """A copy of the checkpoint whose tensors have other names."""
    copy_checkpoint(source, folder)
    tensors = {rename(name): tensor for name, tensor in weights(folder).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def legacy_name(name: str) -> str:
    """The name in the llava-hf repositories."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def module_name(name: str) -> str:
    """The name of the parameter in transformers 5."""
    return {"language_model.lm_head.weight": "lm_head.weight"}.get(name, "model." + name.replace("_model.model.", "_model."))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16"},
        {"dtype": "float32"},
        {"max_shard_size": "1MB"},
        {"tie": True},
        {"kv_heads": 4},
        {"text": {"attention_bias": True, "mlp_bias": True}},
        {"text": {"head_dim": 32, "num_attention_heads": 8}},
        {"multimodal_projector_bias": False},
        {"vision_feature_select_strategy": "full"},
        {"vision_feature_layer": -1},
        {"vision_feature_layer": 2},
    ],
    ids=repr,
)
def test_logits_of_every_kind_of_checkpoint(llava: Llava, tmp_path: Path, changes: dict[str, object]) -> None:
    model = llava(**changes)
    if "vision_feature_select_strategy" in changes:
        model = copy_checkpoint(model, tmp_path / "checkpoint")
        path = model / "processor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert relative_l2(exported_logits(model, tmp_path / "out"), reference_logits(model)) <= 5e-3


def test_the_error_measure_tells_models_apart(llava: Llava) -> None:
    assert relative_l2(reference_logits(llava(seed=1)), reference_logits(llava())) > 0.5


def test_the_sharded_checkpoint_has_several_files(llava: Llava) -> None:
    assert len(list(llava(max_shard_size="1MB").glob("model-*.safetensors"))) >= 3


@pytest.mark.parametrize("rename", [legacy_name, module_name])
def test_tensor_names_of_all_transformers_versions(llava: Llava, tmp_path: Path, rename: Callable[[str], str]) -> None:
    model = rename_tensors(llava(), tmp_path / "checkpoint", rename)
    stored = set(weights(model))
    assert {legacy_name: f"vision_tower.vision_model.{CLASS}", module_name: f"model.vision_tower.{CLASS}"}[rename] in stored
    assert relative_l2(exported_logits(model, tmp_path / "out"), reference_logits(llava())) <= 5e-3


CLASS = "embeddings.class_embedding"


@pytest.mark.parametrize("form", ["one file", "two files", "parameters", "before torch 1.6"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_files_give_the_same_logits(llava: Llava, tmp_path: Path, form: str, dtype: str) -> None:
    model = copy_checkpoint(llava(dtype=dtype), tmp_path / "checkpoint")
    tensors = weights(model)
    (model / "model.safetensors").unlink()
    if form == "two files":
        write_torch_shards(model, tensors)
    elif form == "parameters":
        torch.save({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, model / "pytorch_model.bin")
    else:
        torch.save(tensors, model / "pytorch_model.bin", _use_new_zipfile_serialization=form == "one file")
    source = open_checkpoint(str(model)).source
    assert isinstance(source, TorchSource)
    assert source.dtype(UP_PROJ) == np.dtype(dtype if dtype == "float16" else ml_dtypes.bfloat16)
    assert relative_l2(exported_logits(model, tmp_path / "out"), reference_logits(llava(dtype=dtype))) <= 5e-3


def write_torch_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    weight_map = {}
    for number, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        name = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({key: tensors[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("gone", [True, False], ids=["shards gone", "older shards there"])
def test_a_single_file_wins_over_an_older_index(llava: Llava, tmp_path: Path, kind: str, gone: bool) -> None:
    """As transformers loads it; the index is a leftover of an earlier, sharded save."""
    model = copy_checkpoint(llava(dtype="float32"), tmp_path / "checkpoint")
    older = {name: tensor + 1 for name, tensor in weights(model).items()}
    if kind == "bin":
        torch.save(weights(model), model / "pytorch_model.bin")
        (model / "model.safetensors").unlink()
        write_torch_shards(model, older)
    else:
        shard = "model-00001-of-00001.safetensors"
        save_file(older, model / shard)
        index = {"metadata": {}, "weight_map": dict.fromkeys(older, shard)}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    if gone:
        for path in model.glob("*-0000?-of-0000?.*"):
            path.unlink()
    expected = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32)  # the reference
    actual = open_checkpoint(str(model)).source.load(UP_PROJ)
    assert np.array_equal(actual, expected.model.language_model.layers[1].mlp.up_proj.weight.detach().numpy())


def test_safetensors_come_before_torch_files(llava: Llava, tmp_path: Path) -> None:
    """A pickle is not opened where there are safetensors."""
    model = copy_checkpoint(llava(), tmp_path / "checkpoint")
    (model / "pytorch_model.bin").write_text("nonsense")
    assert isinstance(open_checkpoint(str(model)).source, SafetensorsSource)


def test_buffers_of_old_checkpoints_are_ignored(llava: Llava, tmp_path: Path) -> None:
    model = copy_checkpoint(llava(), tmp_path / "checkpoint")
    extra = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(37)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32),
    }
    save_file(weights(model) | extra, model / "model.safetensors", {"format": "pt"})
    assert not any(name.endswith(("position_ids", "inv_freq")) for name in open_checkpoint(str(model)).source)


def test_every_expected_tensor_is_named_by_the_real_model(llava: Llava) -> None:
    """The graphs need all parameters of transformers' model, except those of tower layers behind the feature."""
    rename = make_renamer(find_layout({}))
    opened = open_checkpoint(str(llava()))
    model = LlavaForConditionalGeneration.from_pretrained(llava())
    unused = ("vision_tower.vision_model.encoder.layers.3.", "vision_tower.vision_model.post_layernorm.")
    expected = {str(rename(name)): tuple(p.shape) for name, p in model.named_parameters()}
    assert expected_shapes(opened.config) == {n: s for n, s in expected.items() if not n.startswith(unused)}


def test_head_may_be_stored_though_it_is_tied(llava: Llava, tmp_path: Path) -> None:
    """The stored head is used then, as in transformers when both are there and differ."""
    model = copy_checkpoint(llava(), tmp_path / "checkpoint", lambda config: config.update(tie_word_embeddings=True))
    assert relative_l2(exported_logits(model, tmp_path / "out"), reference_logits(llava())) <= 5e-3


def test_a_tied_table_may_be_stored_as_the_head(llava: Llava, tmp_path: Path) -> None:
    """transformers ties the one that is there to the other."""
    model = copy_checkpoint(llava(tie=True), tmp_path / "checkpoint")
    table = "language_model.model.embed_tokens.weight"
    tensors = weights(model)
    assert "language_model.lm_head.weight" not in tensors
    renamed = {"language_model.lm_head.weight" if name == table else name: tensor for name, tensor in tensors.items()}
    save_file(renamed, model / "model.safetensors", {"format": "pt"})
    assert relative_l2(exported_logits(model, tmp_path), reference_logits(model)) < 0.01


@pytest.mark.parametrize("dtype", ["auto", "torch.bfloat16", "float16", None])
def test_the_type_that_config_json_names_decides_nothing(llava: Llava, tmp_path: Path, dtype: str | None) -> None:
    def edit(config: dict[str, Any]) -> None:
        for part in (config, config["text_config"], config["vision_config"]):
            part |= {"dtype": dtype, "torch_dtype": dtype}

    model = copy_checkpoint(llava(), tmp_path / "checkpoint", edit)
    assert open_checkpoint(str(model)).config == open_checkpoint(str(llava())).config


def test_head_may_not_be_missing_when_it_is_not_tied(llava: Llava, tmp_path: Path) -> None:
    def untie(config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False

    model = copy_checkpoint(llava(tie=True), tmp_path / "checkpoint", untie)
    with pytest.raises(UserError, match=r"lacks language_model.lm_head.weight though config.json does not tie it"):
        open_checkpoint(str(model))


def test_opening_reads_no_weights(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(SafetensorsSource, "load", refuse)
    opened = open_checkpoint(str(llava()))
    assert opened.config.text.num_layers == 2
    assert opened.config.vision.num_layers == 3
    assert opened.config_json["model_type"] == "llava"


# Where models come from; those on the Hub are in files/test_hub.py


def test_a_folder_comes_before_a_repository_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "someone" / "llava").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("someone/llava") == Location(Path("someone/llava"))


@pytest.mark.parametrize("model", ["llava-70b", "./a/b", "/a/b", "~/a", "a/b/c", ""])
def test_a_name_that_is_neither_folder_nor_repository_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such folder|holds no config.json"):
        open_checkpoint(model)


def test_a_name_that_hugging_face_does_not_allow_is_refused() -> None:
    with pytest.raises(UserError, match="--model a b/c: no such folder, and not a Hugging Face id"):
        find_checkpoint("a b/c")
