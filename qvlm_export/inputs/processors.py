"""Chooses the class that loads a folder's processor: AutoProcessor of transformers, or our replacement for it.

transformers' own LLaVA-OneVision processor cannot be made without a video processor, which needs torchvision.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoProcessor


class LlavaOnevisionProcessor(transformers.LlavaOnevisionProcessor):
    """transformers' LLaVA-OneVision processor for images and text, without its video processor, which needs torchvision.

    It has the name of transformers' class, so that saved files can be loaded by transformers.
    """

    def __init__(  # noqa: PLR0917  (transformers reads the names of its parts from this signature)
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        vision_aspect_ratio: str = "anyres_max_9",
        **_: Any,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.vision_aspect_ratio = vision_aspect_ratio
        self.image_token, self.video_token = image_token, video_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token)
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


# Class name in the files -> the class that replaces transformers' class of that name.
_REPLACEMENTS = {"LlavaOnevisionProcessor": LlavaOnevisionProcessor}
_CONFIG_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def processor_class(folder: Path) -> Any:
    """Returns the class to load the processor in `folder` with: AutoProcessor, or the replacement of the class named there.

    Unreadable files are skipped, as loading with AutoProcessor reports them.
    """
    for name in _CONFIG_FILES:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict) and "processor_class" in content:
            return _REPLACEMENTS.get(str(content["processor_class"]), AutoProcessor)
    return AutoProcessor
