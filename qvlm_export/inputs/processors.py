"""Loads processors with transformers, and completes what their files leave open: chat template, tokens of an image.

transformers' own LLaVA-OneVision processor cannot be made without a video processor, which needs torchvision, so that a
replacement of ours loads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from jinja2 import TemplateError
from transformers import AutoProcessor

from qvlm_export.calibrate.checkpoint.regular_file import check_regular_file
from qvlm_export.calibrate.errors import DAMAGED_FILE_ERRORS, UserError
from qvlm_export.checkpoints.files.hub_errors import first_line
from qvlm_export.engines.config import ModelConfig


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
_CONFIG_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "config.json")
_SUFFIXES = (".json", ".jinja", ".model", ".txt")  # of the files that transformers reads
_MARKER = "\u2063text\u2063"  # invisible separators, which no template writes

# Begins a template that is made for texts: joins the parts of each turn to a text, pictures first.
_TURNS_AS_TEXT = (
    "{% set turns = namespace(all=[]) %}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set turns.all = turns.all + [message] %}{% else %}"
    "{% set content = namespace(text='') %}"
    "{% for part in message['content'] if part['type'] == 'image' %}"
    "{% set content.text = content.text + IMAGE + '\n' %}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{% set content.text = content.text + part['text'] %}{% endfor %}"
    "{% set turns.all = turns.all + [{'role': message['role'], 'content': content.text}] %}"
    "{% endif %}{% endfor %}"
    "{% set messages = turns.all %}{{ '' }}"
)


def processor_class(folder: Path) -> Any:
    """Returns the class to load the processor in `folder` with: AutoProcessor, or the replacement of the class named there.

    Unreadable files are skipped, as loading with AutoProcessor reports them.
    """
    named = (content["processor_class"] for _, content in _read_settings(folder) if "processor_class" in content)
    return _REPLACEMENTS.get(str(next(named, None)), AutoProcessor)


def load_with_transformers(folder: Path) -> Any:
    """Returns what transformers makes of the processor's files in `folder`, without ever running code that lies there.

    Raises UserError when files are missing, damaged or no regular files, and when the processor needs such code.
    """
    for path in (*folder.glob("*"), *folder.glob("chat_templates/*")):
        if path.suffix in _SUFFIXES and not path.is_dir():
            check_regular_file(path, "a file of a processor")
    code = _find_code(folder)
    refusal = UserError(
        f"{folder}: its processor needs code of the checkpoint ({code}), which is never run; give a processor of a class "
        "that transformers has"
    )
    if code and _has_unknown_tokenizer(folder):  # transformers would take another class for it
        raise refusal
    try:
        return processor_class(folder).from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing narrower for a damaged tokenizer.json
        if code:
            raise refusal from error
        raise UserError(
            f"{folder}: its processor cannot be loaded ({first_line(error)}); add the tokenizer and processor files"
        ) from error


def _find_code(folder: Path) -> str:
    """Returns which file names code of the checkpoint, and which code; an empty string when none does."""
    for name, content in _read_settings(folder):
        for part in (content, *(value for value in content.values() if isinstance(value, dict))):
            if "auto_map" in part:
                return f"{name}: auto_map {part['auto_map']}"
    return ""


def _has_unknown_tokenizer(folder: Path) -> bool:
    settings = dict(_read_settings(folder)).get("tokenizer_config.json", {})
    return "auto_map" in settings and not hasattr(
        transformers, str(settings.get("tokenizer_class", "PreTrainedTokenizerFast"))
    )


def _read_settings(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields name and content of the files that may name classes; skips those that are missing or unreadable."""
    for name in _CONFIG_FILES:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            yield name, content


def choose_chat_template(processor: Any) -> None:
    """Gives processor and tokenizer one chat template, in place, so that saving and loading them changes nothing.

    transformers saves the tokenizer's template under the name from which it then loads the processor's. Taken is the first
    that places images, of the processor's and the tokenizer's. A template that is made for texts and knows no images gets
    them as texts. When neither places images, the first one stays, for `check_processor` to refuse.
    """
    stored = [_default_template(part.chat_template) for part in (processor, processor.tokenizer)]
    templates = list(dict.fromkeys(template for template in stored if template))
    placing = (chosen for template in templates if (chosen := _make_place_images(processor, template)))
    processor.chat_template = processor.tokenizer.chat_template = next(placing, next(iter(templates), None))


def _default_template(template: Any) -> str | None:
    return template.get("default") if isinstance(template, dict) else template


def _make_place_images(processor: Any, template: str) -> str | None:
    """Returns the template as it is, or for images as texts, whichever places one image token; None if neither does."""
    images = _count_images(processor, template)
    if images == 1:
        return template
    as_text = _TURNS_AS_TEXT.replace("IMAGE", repr(processor.image_token)) + template
    return as_text if images == 0 and _count_images(processor, as_text) == 1 else None


def _count_images(processor: Any, template: str) -> int:
    """Returns how many image tokens a template writes for a turn of one image and a text; 0 when it cannot take the turn."""
    content = [{"type": "image"}, {"type": "text", "text": _MARKER}]
    try:
        text = str(
            processor.apply_chat_template(
                [{"role": "user", "content": content}], chat_template=template, add_generation_prompt=True
            )
        )
    except (*DAMAGED_FILE_ERRORS, TemplateError):
        return 0
    return text.count(processor.image_token) if _MARKER in text else 0


def complete_processor(processor: Any, config: ModelConfig) -> None:
    """Fills in, in place, how many tokens an image becomes, where the files do not say it; older ones left it to the model.

    A processor that says something else than `config` is left for `check_processor` to refuse.
    """
    vision = config.vision
    strategy = "default" if vision.class_token and not vision.keep_class_token else "full"
    known = {
        "patch_size": vision.patch_size,
        "num_image_tokens": vision.num_patches,
        "vision_feature_select_strategy": strategy,
    }
    for name, value in known.items():
        if getattr(processor, name, value) is None:
            setattr(processor, name, value)
    if getattr(processor, "num_additional_image_tokens", None) == 0:  # also where it is missing
        dropped = processor.vision_feature_select_strategy == "default"
        if vision.num_patches - dropped != vision.tokens_per_image:
            processor.num_additional_image_tokens = int(vision.class_token)
