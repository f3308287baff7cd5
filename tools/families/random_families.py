"""Small random checkpoints of every supported model family, with its real structure, as `save_pretrained` writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaProcessor,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    VipLlavaConfig,
)

from qvlm_export.inputs.processors import LlavaOnevisionProcessor
from tools.tiny import model

SIDE, PATCH = 48, 8
PATCHES = (SIDE // PATCH) ** 2
NEXT_POINTS = [[48, 96], [96, 48], [96, 96], [144, 48], [48, 144]]  # those of llava-hf, scaled to the side of this tower
ANY_POINTS = [[SIDE * h, SIDE * w] for h in range(1, 7) for w in range(1, 7)]
IMAGE = 4


@cache
def _tokenizer() -> Any:
    return model.train_tokenizer(num_scenes=50)


def clip(**changes: Any) -> CLIPVisionConfig:
    """A small CLIP tower with other settings where `changes` names them."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2}
    return CLIPVisionConfig(**{**sizes, "image_size": SIDE, "patch_size": PATCH, "projection_dim": 128, **changes})


def siglip() -> SiglipVisionConfig:
    """A small SigLIP tower that, like SO400M, has awkward sizes.

    Heads have 72 channels, no group size divides the width, and the image side is no multiple of the patch size.
    """
    sizes = {"hidden_size": 144, "intermediate_size": 304, "num_hidden_layers": 3, "num_attention_heads": 2}
    return SiglipVisionConfig(**sizes, image_size=SIDE + 3, patch_size=PATCH, vision_use_head=False)


def decoder(kind: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A small decoder of the kind, such as LlamaConfig, with other settings where `changes` names them."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    common = {"num_key_value_heads": 2, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5}
    return kind(**{**sizes, **tokens, **common, **changes})


def _llava_processor(**changes: Any) -> Any:
    side = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side)
    settings = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(
        **{"image_processor": images, **settings, **changes},
        tokenizer=_tokenizer(),
        chat_template=model.CHAT_TEMPLATE,
    )


def _interleave_processor() -> Any:
    side = {"height": SIDE + 3, "width": SIDE + 3}
    strategy = {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    return _llava_processor(image_processor=SiglipImageProcessorPil(size=side), **strategy)


def _next_processor() -> Any:
    side = {"height": SIDE, "width": SIDE}
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=side, image_grid_pinpoints=NEXT_POINTS, do_center_crop=True
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=model.CHAT_TEMPLATE,
    )


def _onevision_processor() -> Any:
    side = SIDE + 3
    points = [[h // SIDE * side, w // SIDE * side] for h, w in ANY_POINTS]
    images = LlavaOnevisionImageProcessorPil(size={"height": side, "width": side}, image_grid_pinpoints=points)
    return LlavaOnevisionProcessor(
        image_processor=images,
        tokenizer=_tokenizer(),
        num_image_tokens=PATCHES,
        vision_feature_select_strategy="full",
        chat_template=model.CHAT_TEMPLATE,
        vision_aspect_ratio="anyres_max_4",
    )


def _llava(text: PreTrainedConfig, **changes: Any) -> LlavaConfig:
    return LlavaConfig(vision_config=clip(), text_config=text, image_token_index=IMAGE, image_seq_length=PATCHES, **changes)


def _next(text: PreTrainedConfig) -> LlavaNextConfig:
    return LlavaNextConfig(vision_config=clip(), text_config=text, image_token_index=IMAGE, image_grid_pinpoints=NEXT_POINTS)


def _onevision() -> LlavaOnevisionConfig:
    side = SIDE + 3
    points = [[h // SIDE * side, w // SIDE * side] for h, w in ANY_POINTS]
    text = decoder(Qwen2Config, max_position_embeddings=2048)
    ratio = {"image_grid_pinpoints": points, "vision_aspect_ratio": "anyres_max_4"}
    return LlavaOnevisionConfig(
        vision_config=siglip(), text_config=text, image_token_index=IMAGE, video_token_index=5, **ratio
    )


@dataclass(frozen=True)
class Kind:
    """A model family with one of its decoders. repositories: the published checkpoints that are built like it."""

    repositories: str
    config: Callable[[], PreTrainedConfig]
    processor: Callable[[], Any]


FEATURES = [-2, -3, -4, 1, 2]  # five layers, one of them counted from the beginning
LLAMA3 = {"rope_theta": 5e5, "num_key_value_heads": 1}
KINDS = {
    "llava": Kind("llava-hf/llava-1.5-*", lambda: _llava(decoder(LlamaConfig)), _llava_processor),
    "bakllava": Kind("llava-hf/bakLlava-v1-hf", lambda: _llava(decoder(MistralConfig, sliding_window=24)), _llava_processor),
    "interleave": Kind(
        "llava-hf/llava-interleave-qwen-*",
        lambda: LlavaConfig(
            vision_config=siglip(),
            text_config=decoder(Qwen2Config),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        _interleave_processor,
    ),
    "vipllava": Kind(
        "llava-hf/vip-llava-*",
        lambda: VipLlavaConfig(
            vision_config=clip(), text_config=decoder(LlamaConfig), image_token_index=IMAGE, vision_feature_layer=FEATURES
        ),
        _llava_processor,
    ),
    "next-vicuna": Kind("llava-hf/llava-v1.6-vicuna-*", lambda: _next(decoder(LlamaConfig)), _next_processor),
    "next-mistral": Kind(
        "llava-hf/llava-v1.6-mistral-7b-hf",
        lambda: _next(decoder(MistralConfig, sliding_window=None, rope_theta=1e6)),
        _next_processor,
    ),
    "next-llama3": Kind("llava-hf/llama3-llava-next-8b-hf", lambda: _next(decoder(LlamaConfig, **LLAMA3)), _next_processor),
    "next-qwen": Kind("llava-hf/llava-next-72b-hf", lambda: _next(decoder(Qwen2Config)), _next_processor),
    "onevision": Kind("llava-hf/llava-onevision-qwen2-*", _onevision, _onevision_processor),
}


def write_family(folder: Path, kind: str, seed: int = 0) -> None:
    """Writes a float16 checkpoint of a kind in KINDS, with its processor."""
    torch.manual_seed(seed)
    config = KINDS[kind].config()
    model = AutoModelForImageTextToText.from_config(config)
    randomize_(model)
    model.half().save_pretrained(folder)
    KINDS[kind].processor().save_pretrained(folder)


def randomize_(model: torch.nn.Module) -> None:
    """Draws weights large enough for attention and logits to vary, unlike those of the default initialization."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.08)
            elif name.endswith(("bias", "newline")):
                parameter.normal_(std=0.05)
