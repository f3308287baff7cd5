"""Which class of transformers loads the processor in a folder, and one that stands in for transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoProcessor


class LlavaOnevisionProcessor(transformers.LlavaOnevisionProcessor):
    """transformers' own without videos, whose processor it would need torchvision for. Saved files name its class."""

    def __init__(  # noqa: PLR0917  (transformers reads its parts from this signature)
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


# Instead of transformers' class of that name.
_CLASSES = {"LlavaOnevisionProcessor": LlavaOnevisionProcessor}
_NAMED_IN = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def processor_class(folder: Path) -> Any:
    """The class to load with: transformers' AutoProcessor, or what stands in for the class that the files name.

    Files that cannot be read are left to transformers to report.
    """
    for name in _NAMED_IN:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict) and "processor_class" in content:
            return _CLASSES.get(str(content["processor_class"]), AutoProcessor)
    return AutoProcessor
