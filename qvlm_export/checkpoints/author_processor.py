"""Builds a transformers processor for checkpoints in the layout of LLaVA's authors, which have a tokenizer only.

Images are preprocessed as for CLIP. Text is tokenized as in LLaVA's own code, which encodes each text between images
separately, so that it begins with Llama's leading space.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlamaTokenizer,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.author_layout import convert_config, find_tower, known_tower, read_tower_name
from qvlm_export.checkpoints.chat_templates import CONVERSATIONS, Conversation, chat_template
from qvlm_export.checkpoints.files.hub import read_config
from qvlm_export.checkpoints.files.hub_errors import first_line

MIN_TOKEN_SHARE = 0.9  # of vocab_size: some models pad their tables to more rows than the tokenizer has tokens
IMAGE, START, END = "<image>", "<im_start>", "<im_end>"


def find_conversation(config: Mapping[str, Any]) -> Conversation:
    """Returns the conversation that a checkpoint was trained with, inferred from its model and projector types."""
    if config.get("model_type") == "llava_mistral":
        return CONVERSATIONS["mistral_instruct"]
    return CONVERSATIONS["llava_v1" if config.get("mm_projector_type") in (None, "linear") else "vicuna_v1"]


def make_processor(folder: Path) -> Any:
    """Returns the processor of the checkpoint in `folder`. Raises UserError when tokenizer or tower settings are missing."""
    config = read_config(folder)
    converted = convert_config(config, folder)
    vision, legacy = converted["vision_config"], _is_legacy(folder)
    tokenizer = _load_tokenizer(folder, int(config["vocab_size"]), legacy)
    has_start_end = bool(config.get("mm_use_im_start_end"))
    if has_start_end and {START, END} - set(tokenizer.get_vocab()):
        raise UserError(
            f"{folder}: config.json says mm_use_im_start_end, but the tokenizer has no {START} and {END}; "
            "add added_tokens.json of the model"
        )
    # The text after an image must begin with Llama's leading space. A tokenizer that is not legacy adds it to the first text
    # only, so the template writes it.
    image = f"{START}{IMAGE}{END}\n" if has_start_end else f"{IMAGE}\n" if legacy else f"{IMAGE} \n"
    processor_class = LlavaProcessor if converted["model_type"] == "llava" else LlavaNextProcessor
    return processor_class(
        image_processor=_make_image_processor(config, vision["image_size"], read_tower_name(config, folder), folder),
        tokenizer=tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy=converted["vision_feature_select_strategy"],
        num_additional_image_tokens=1,
        chat_template=chat_template(find_conversation(config), image),
    )


def _make_image_processor(config: Mapping[str, Any], image_size: int, tower: str, folder: Path) -> Any:
    """Returns CLIP's preprocessing, by image_aspect_ratio of the cropped image, the padded image, or its tiles."""
    settings: dict[str, Any] = {}
    if known_tower(tower) is None:
        name = "preprocessor_config.json"
        stored = read_config(find_tower(tower, folder).folder, name, "a CLIP tower, image processor included")
        settings = {key: stored[key] for key in ("image_mean", "image_std", "resample", "rescale_factor") if key in stored}
    settings |= {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    aspect = config.get("image_aspect_ratio") or "square"
    if aspect == "pad":
        return LlavaImageProcessorPil(do_pad=True, **settings)
    if aspect == "square":
        return CLIPImageProcessorPil(**settings)
    return LlavaNextImageProcessorPil(image_grid_pinpoints=config["image_grid_pinpoints"], **settings)


def _is_legacy(folder: Path) -> bool:
    """Returns whether the tokenizer adds a leading space to every text between special tokens, as Llama's did at first."""
    path = folder / "tokenizer_config.json"
    return not path.exists() or read_config(folder, path.name).get("legacy") is not False


def _load_tokenizer(folder: Path, vocabulary: int, legacy: bool) -> Any:
    """Returns the checkpoint's tokenizer, with `<image>` as the first token after the model's vocabulary."""
    slow, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    if not slow.exists() and not fast.exists():
        raise UserError(f"{folder}: holds no {slow.name}; add it, it belongs to the language model")
    try:
        if slow.exists() and not fast.exists():
            tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=legacy, trust_remote_code=False)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # sentencepiece and tokenizers raise nothing narrower for damaged files
        raise UserError(f"{folder}: its tokenizer cannot be loaded ({first_line(error)}); download it again") from error
    if not MIN_TOKEN_SHARE * vocabulary <= len(tokenizer) <= vocabulary:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, config.json says vocab_size {vocabulary}; "
            "do they belong together?"
        )
    fillers = [f"<unused{number}>" for number in range(vocabulary - len(tokenizer))]
    tokenizer.add_tokens(fillers, special_tokens=True)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    # Not as a LlamaTokenizer, which does not save whether it is legacy.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.pad_token or tokenizer.unk_token,
        padding_side="left",
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
    )
