"""Small random checkpoints in the file layout of LLaVA's authors, as in the repositories of liuhaotian.

The model is first made in transformers' form, as llava-hf would have converted it, and then split into the authors' layout:
the language model with `mm_*` keys in its configuration and other names for the projector, CLIP in a separate folder unless
it was trained, too, the tokenizer as a sentencepiece model, and no embedding rows for an image token.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MistralConfig,
    PreTrainedConfig,
)

from tools.families.random_families import NEXT_POINTS, clip, decoder, randomize_
from tools.tiny import scenes

VOCABULARY = 480
TOWER = "small-clip"
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True)
class Original:
    """A kind of checkpoint.

    keys: further keys of config.json. tokens: added to the tokenizer. inside: whether the checkpoint holds the weights of
    the tower. side: of an image, in pixels. legacy: as in tokenizer_config.json, None for no such key. text_keys: further
    keys of the decoder's configuration.
    """

    repositories: str
    keys: Mapping[str, Any]
    text: type[PreTrainedConfig] = LlamaConfig
    tokens: tuple[str, ...] = ()
    inside: bool = False
    safetensors: bool = False
    side: int = 48
    legacy: bool | None = False
    text_keys: Mapping[str, Any] = field(default_factory=dict)


START_END = ("<im_patch>", "<im_start>", "<im_end>")
ORIGINALS = {
    "v1.5": Original(
        "liuhaotian/llava-v1.5-*",
        {"model_type": "llava", "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"},
    ),
    "v1.3": Original(
        "liuhaotian/llava-*-v1.3 (ScienceQA)",
        {"model_type": "llava", "image_aspect_ratio": "square"},
        safetensors=True,
        side=32,
        legacy=None,
    ),
    "v1": Original(
        "liuhaotian/LLaVA-*-v1 (image start and end tokens)",
        {"model_type": "llava", "mm_use_im_start_end": True},
        tokens=START_END,
        side=32,
        legacy=None,
    ),
    "v1.6-vicuna": Original(
        "liuhaotian/llava-v1.6-vicuna-*",
        {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "anyres"},
        inside=True,
        safetensors=True,
    ),
    "v1.6-mistral": Original(
        "liuhaotian/llava-v1.6-mistral-7b",
        {"model_type": "llava_mistral", "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "anyres"},
        text=MistralConfig,
        inside=True,
        legacy=True,
        text_keys={"sliding_window": None, "rope_theta": 1e6},
    ),
}


@cache
def sentencepiece_model() -> bytes:
    """A tokenizer.model like Llama's: BPE with byte fallback and a dummy prefix, without normalization."""
    lines = [f"USER: {q.text} ASSISTANT: {q.answer}" for n in range(100) for q in scenes.questions("train", n)[1]]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=VOCABULARY, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True, hard_vocab_limit=False,
        split_digits=True, allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        num_threads=1,
    )  # fmt: skip
    return model.getvalue()


def make_config(kind: Original, vocabulary: int) -> PreTrainedConfig:
    """The configuration that llava-hf would have: tables of a multiple of 64 rows, the image token after the vocabulary."""
    sizes = {"vocab_size": (vocabulary // 64 + 1) * 64, "pad_token_id": 0, **kind.text_keys}
    common = {
        "vision_config": clip(image_size=kind.side),
        "text_config": decoder(kind.text, **sizes),
        "image_token_index": vocabulary,
    }
    if kind.keys.get("image_aspect_ratio") == "anyres":
        return LlavaNextConfig(**common, image_grid_pinpoints=NEXT_POINTS)
    linear = "mm_projector_type" not in kind.keys
    return LlavaConfig(**common, projector_hidden_act="linear" if linear else "gelu")


def make_model(config: PreTrainedConfig, seed: int = 0) -> torch.nn.Module:
    """transformers' model in float32 with values that float16 can represent.

    Embedding rows after the vocabulary are the mean of the others, and the second linear of a projector that has only one in
    the authors' layout is the identity.
    """
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).eval()
    randomize_(model)
    with torch.no_grad():
        for parameter in model.parameters():  # not the buffers: the rotary table must not be rounded
            parameter.copy_(parameter.half().float())
        for table in (model.model.language_model.embed_tokens.weight, model.lm_head.weight):
            table[config.image_token_index :] = table[: config.image_token_index].mean(0).half().float()
        if config.projector_hidden_act == "linear":
            second = model.model.multi_modal_projector.linear_2
            second.weight.copy_(torch.eye(len(second.weight)))
            second.bias.zero_()
    return model


def write_original(folder: Path, name: str, seed: int = 0) -> torch.nn.Module:
    """Writes a checkpoint of a kind in ORIGINALS, and its tower in a folder beside it; returns the model in float32."""
    kind, (tower_folder, tower_name) = ORIGINALS[name], _locate_tower(folder, name)
    vocabulary = VOCABULARY + len(kind.tokens)
    config = make_config(kind, vocabulary)
    model = make_model(config, seed)
    folder.mkdir(parents=True)
    own, tower = _split_weights(model, config, kind.inside)
    save = _save_safetensors if kind.safetensors else _save_torch
    save(folder, own)
    _write_tower(tower_folder, config, tower, kind.safetensors)
    _write_config(folder, kind, config, vocabulary, tower_name)
    _write_tokenizer(folder, kind)
    return model


def _locate_tower(folder: Path, name: str) -> tuple[Path, str]:
    """The folder of the tower and its name in config.json: a path, or a repository whose folder lies beside."""
    place = folder.parent / f"{name}-{TOWER}"
    return (place, f"openai/{place.name}") if name == "v1.5" else (place, str(place))


def _split_weights(
    model: torch.nn.Module, config: PreTrainedConfig, inside: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of the language model's checkpoint and of the tower's, under the names of the authors' layout."""
    own: dict[str, torch.Tensor] = {}
    tower: dict[str, torch.Tensor] = {}
    rows, linear = config.image_token_index, config.projector_hidden_act == "linear"
    for name, value in model.state_dict().items():
        tensor = value.half()
        if name.startswith("model.vision_tower."):
            inner = name.removeprefix("model.vision_tower.")
            if inside:
                own[f"model.vision_tower.vision_tower.vision_model.{inner}"] = tensor
            else:
                tower[f"vision_model.{inner}"] = value.clone()  # float32, as in OpenAI's repository
        elif name.startswith("model.multi_modal_projector."):
            number, kind = name.removeprefix("model.multi_modal_projector.linear_").split(".")
            if not linear:
                own[f"model.mm_projector.{'0' if number == '1' else '2'}.{kind}"] = tensor
            elif number == "1":
                own[f"model.mm_projector.{kind}"] = tensor
        elif name == "lm_head.weight":
            own[name] = tensor[:rows].clone()
        else:
            own_name = name.replace("model.language_model.", "model.")
            own[own_name] = tensor[:rows].clone() if "embed_tokens" in name else tensor
    own["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # a buffer that transformers stored at that time
    return own, tower


def _shards(tensors: Mapping[str, torch.Tensor], pattern: str) -> dict[str, dict[str, torch.Tensor]]:
    names = list(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    return {pattern.format(n): {k: tensors[k].contiguous() for k in half} for n, half in enumerate(halves, start=1)}


def _save_torch(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    shards = _shards(tensors, "pytorch_model-{:05d}-of-00002.bin")
    for name, part in shards.items():
        torch.save(part, folder / name)
    _write_index(folder / "pytorch_model.bin.index.json", shards)


def _save_safetensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    shards = _shards(tensors, "model-{:05d}-of-00002.safetensors")
    for name, part in shards.items():
        save_file(part, folder / name, {"format": "pt"})
    _write_index(folder / "model.safetensors.index.json", shards)


def _write_index(path: Path, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    weight_map = {key: name for name, part in shards.items() for key in part}
    _write_json(path, {"metadata": {}, "weight_map": weight_map})


def _write_tower(folder: Path, config: PreTrainedConfig, tensors: dict[str, torch.Tensor], safetensors: bool) -> None:
    """Writes a CLIP repository as OpenAI publishes it, with some of the text model's tensors."""
    folder.mkdir(parents=True)
    vision = config.vision_config.to_dict()
    _write_json(folder / "config.json", {"model_type": "clip", "text_config": {}, "vision_config": vision})
    side = config.vision_config.image_size
    crop = {"crop_size": side, "size": side, "resample": 3, "do_resize": True, "do_center_crop": True}
    colours = {"image_mean": MEAN, "image_std": STD, "do_normalize": True, "image_processor_type": "CLIPImageProcessor"}
    _write_json(folder / "preprocessor_config.json", crop | colours)
    if not tensors:
        return
    whole = tensors | {"text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.ones(())}
    if safetensors:
        save_file({k: v.contiguous() for k, v in whole.items()}, folder / "model.safetensors", {"format": "pt"})
    else:
        torch.save(whole, folder / "pytorch_model.bin")


def _write_config(folder: Path, kind: Original, config: PreTrainedConfig, vocabulary: int, tower: str) -> None:
    text = config.text_config
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
        "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    mistral = kind.text is MistralConfig
    content = {key: getattr(text, key) for key in keys} | {
        "architectures": ["LlavaMistralForCausalLM" if mistral else "LlavaLlamaForCausalLM"],
        "mm_hidden_size": config.vision_config.hidden_size, "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2, "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "use_mm_proj": True,
        "mm_vision_tower": tower, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.31.0", "vocab_size": vocabulary, "pretraining_tp": 1,
    }  # fmt: skip
    if kind.inside:
        content |= {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": NEXT_POINTS}
    _write_json(folder / "config.json", content | dict(kind.text_keys) | dict(kind.keys))


def _write_tokenizer(folder: Path, kind: Original) -> None:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    settings: dict[str, Any] = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "model_max_length": 2048, "padding_side": "right", "tokenizer_class": "LlamaTokenizer",
    }  # fmt: skip
    if kind.legacy is not None:
        settings["legacy"] = kind.legacy
    _write_json(folder / "tokenizer_config.json", settings)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", special)
    if kind.tokens:
        _write_json(folder / "added_tokens.json", {token: VOCABULARY + n for n, token in enumerate(kind.tokens)})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
