"""Writes small LLaVA checkpoints with random weights, processor included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from tools.tiny import model as tiny_model

_PROCESSOR: list[Any] = []


def processor() -> Any:
    """The processor of the tiny model with a tokenizer that is trained on few scenes; cached."""
    if not _PROCESSOR:
        _PROCESSOR.append(tiny_model.make_processor(tiny_model.train_tokenizer(num_scenes=50)))
    return _PROCESSOR[0]


def write_random_llava(
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "float16",
    kv_heads: int = 2,
    tie: bool = False,
    max_shard_size: str = "1GB",
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    **top: Any,
) -> None:
    """Writes a checkpoint as `save_pretrained` does.

    text, vision, top: changes to the configurations of decoder and tower, and to that of the whole model.
    """
    config = tiny_model.make_config(processor().tokenizer)
    config.text_config.num_hidden_layers = 2
    config.text_config.num_key_value_heads = kv_heads
    for key, value in (text or {}).items():
        setattr(config.text_config, key, value)
    for key, value in (vision or {}).items():
        setattr(config.vision_config, key, value)
    for key, value in top.items():
        setattr(config, key, value)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tie
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large enough for attention and logits to vary; the default initialization is nearly constant.
            if parameter.ndim > 1:
                parameter.normal_(std=0.08)
            elif name.endswith("bias"):
                parameter.normal_(std=0.02)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    processor().save_pretrained(folder)
