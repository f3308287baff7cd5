"""The prefix of a chat template: the tokens that every prompt of a model begins with (`calibrate/checkpoint/prefix.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError
from PIL import Image

from qvlm_export.calibrate.checkpoint.prefix import count_shared
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.errors import DAMAGED_FILE_ERRORS, UserError
from qvlm_export.checkpoints.chat_templates import chat_text
from qvlm_export.engines.config import ModelConfig
from qvlm_export.inputs.samples import encode_prompt

AUTO = "auto"
# Conversations that differ from the first character of the user's first turn on, with and without pictures.
_CONVERSATIONS: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"role": "user", "text": "What is it?", "images": 1},),
    ({"role": "user", "text": "Describe the pictures.", "images": 2},),
    ({"role": "user", "text": "1 + 1?"},),
    ({"role": "user", "text": "\u4f60\u597d"},),
    # Tokenizers join white space with the line break before it.
    ({"role": "user", "text": "  two spaces"},),
    ({"role": "user", "text": "\n\na line"},),
    ({"role": "user", "text": "\tx"},),
    ({"role": "user", "text": "why"}, {"role": "assistant", "text": "Because."}, {"role": "user", "text": "Sure?"}),
)


def parse_prefix(value: str) -> int | None:
    """Returns the number of tokens that `--prefix` asks for, None for `auto`. Raises UserError for anything else."""
    if value == AUTO:
        return None
    if not value.isascii() or not value.isdigit():
        raise UserError(f"--prefix {value}: give auto, a number of tokens, or 0 for none")
    return int(value[:9])


def find_common_prefix(processor: Any, config: ModelConfig) -> tuple[int, ...]:
    """Returns the tokens that all prompts of the chat template begin with, up to the first image token; they may be none."""
    grey, prompts = Image.new("RGB", (96, 64), (127, 127, 127)), []
    for turns in _CONVERSATIONS:
        images = [grey] * sum(turn.get("images", 0) for turn in turns)
        try:
            prompts.append(encode_prompt(processor, config, chat_text(processor, list(turns)), images).input_ids)
        except (*DAMAGED_FILE_ERRORS, TemplateError, UserError):  # not every template takes every conversation
            continue
    shortest = min((len(prompt) for prompt in prompts), default=1) - 1  # a prompt keeps a token of its own
    common: list[int] = []
    for position in range(shortest):
        tokens = {int(prompt[position]) for prompt in prompts}
        if len(tokens) > 1 or config.image_token_id in tokens:
            break
        common += tokens
    return tuple(common)


def choose_prefix(value: str, processor: Any, config: ModelConfig, samples: Sequence[Sample]) -> tuple[int, ...]:
    """Returns the tokens of the prefix that `--prefix` asks for; none for 0. Those of `auto` begin every sample, too.

    Raises UserError when the prompts of the model's chat template share fewer tokens.
    """
    asked = parse_prefix(value)
    if asked == 0:
        return ()
    common = find_common_prefix(processor, config)
    if asked is not None and asked > len(common):
        what = f"only the first {len(common)} tokens" if common else "no token"
        raise UserError(f"--prefix {value}: prompts of this model's chat template share {what}; give auto or 0")
    if asked is not None:
        return common[:asked]
    return common[: min((count_shared(common, sample.input_ids) for sample in samples), default=len(common))]


def describe_prefix(processor: Any, token_ids: tuple[int, ...]) -> dict[str, Any]:
    """Returns what the manifest says of the prefix: its token ids, and their text."""
    return {"token_ids": list(token_ids), "text": str(processor.tokenizer.decode(np.array(token_ids, np.int64)))}
