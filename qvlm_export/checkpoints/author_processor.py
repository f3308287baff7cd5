"""A processor for checkpoints of LLaVA's authors, which have a tokenizer and no more.

Sources: CLIP's preprocessing, and LLaVA's own: each text between pictures is encoded alone, which gives it Llama's leading
space.
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
from qvlm_export.checkpoints.author_layout import TOWERS, convert_config, tower_folder, tower_name
from qvlm_export.checkpoints.chat_templates import CONVERSATIONS, Conversation, chat_template
from qvlm_export.checkpoints.hub import first_line, read_config

LEAST_KNOWN = 0.9  # of a vocabulary: some models have more rows than tokens, for the sake of even numbers
IMAGE, START, END = "<image>", "<im_start>", "<im_end>"


def conversation_of(config: Mapping[str, Any]) -> Conversation:
    """What a checkpoint was trained with: its name is not in config.json, but it follows from what is."""
    if config.get("model_type") == "llava_mistral":
        return CONVERSATIONS["mistral_instruct"]
    return CONVERSATIONS["llava_v1" if config.get("mm_projector_type") in (None, "linear") else "vicuna_v1"]


def make_processor(folder: Path) -> Any:
    """The processor of a checkpoint folder. Raises UserError when its tokenizer or the tower's settings are missing."""
    config = read_config(folder)
    converted = convert_config(config, folder)
    vision, legacy = converted["vision_config"], _is_legacy(folder)
    tokenizer = _tokenizer(folder, int(config["vocab_size"]), legacy)
    wrapped = bool(config.get("mm_use_im_start_end"))
    if wrapped and {START, END} - set(tokenizer.get_vocab()):
        raise UserError(
            f"{folder}: config.json says mm_use_im_start_end, but the tokenizer has no {START} and {END}; "
            "add added_tokens.json of the model"
        )
    # A text behind a picture has Llama's leading space; a tokenizer that is not legacy gives it to the first text alone.
    picture = f"{START}{IMAGE}{END}\n" if wrapped else f"{IMAGE}\n" if legacy else f"{IMAGE} \n"
    kind = LlavaProcessor if converted["model_type"] == "llava" else LlavaNextProcessor
    return kind(
        image_processor=_image_processor(config, vision["image_size"], tower_name(config, folder), folder),
        tokenizer=tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy=converted["vision_feature_select_strategy"],
        num_additional_image_tokens=1,
        chat_template=chat_template(conversation_of(config), picture),
    )


def _image_processor(config: Mapping[str, Any], side: int, tower: str, folder: Path) -> Any:
    """CLIP's preprocessing, of square pictures, of pictures padded to squares, or of their tiles."""
    settings: dict[str, Any] = {}
    if tower not in TOWERS:
        name = "preprocessor_config.json"
        stored = read_config(tower_folder(tower, folder), name, "a CLIP tower, image processor included")
        settings = {key: stored[key] for key in ("image_mean", "image_std", "resample", "rescale_factor") if key in stored}
    settings |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    aspect = config.get("image_aspect_ratio") or "square"
    if aspect == "pad":
        return LlavaImageProcessorPil(do_pad=True, **settings)
    if aspect == "square":
        return CLIPImageProcessorPil(**settings)
    return LlavaNextImageProcessorPil(image_grid_pinpoints=config["image_grid_pinpoints"], **settings)


def _is_legacy(folder: Path) -> bool:
    """Whether the tokenizer gives every text between special tokens a leading space, as Llama's did at first."""
    path = folder / "tokenizer_config.json"
    return not path.exists() or read_config(folder, path.name).get("legacy") is not False


def _tokenizer(folder: Path, vocabulary: int, legacy: bool) -> Any:
    """The checkpoint's tokenizer, with `<image>` as the first token behind the model's vocabulary."""
    slow, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    if not slow.exists() and not fast.exists():
        raise UserError(f"{folder}: holds no {slow.name}; add it, it belongs to the language model")
    try:
        if slow.exists() and not fast.exists():
            tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=legacy)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # sentencepiece and tokenizers raise nothing narrower for damaged files
        raise UserError(f"{folder}: its tokenizer cannot be loaded ({first_line(error)}); download it again") from error
    if not LEAST_KNOWN * vocabulary <= len(tokenizer) <= vocabulary:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, config.json says vocab_size {vocabulary}; "
            "do they belong together?"
        )
    fillers = [f"<unused{number}>" for number in range(vocabulary - len(tokenizer))]
    tokenizer.add_tokens(fillers, special_tokens=True)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    # As what it is, not as a LlamaTokenizer: that one forgets when it is saved whether it was legacy.
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
