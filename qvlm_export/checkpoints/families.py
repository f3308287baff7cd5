"""Tables of the supported model families and checkpoint layouts, one row each; no other module branches on them.

A layout says how stored tensor names are renamed to the canonical ones (those of the llava-hf 1.5 repositories, which the
graphs are declared with), and how a checkpoint is converted to what llava-hf would have written. A family says which vision
towers and decoders such a checkpoint may hold, and whether images are cut into tiles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig, PreTrainedConfig, VipLlavaConfig

from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints import author_layout
from qvlm_export.checkpoints.author_processor import make_processor


@dataclass(frozen=True)
class Layout:
    """How checkpoints of one layout are read and converted.

    A checkpoint has the first layout in LAYOUTS of whose `config_keys` its config.json has one; a layout without keys fits
    every config.json. A config.json with a text_config has the last one, whatever keys a conversion left in it.

    renames: regular expressions and replacements for tensor names, applied in order.

    convert: (config.json as stored, its folder) -> config.json as llava-hf would have written it.
    open_source: (the folder's tensors by canonical names, config.json as stored, its folder) -> all tensors of the converted
    checkpoint. make_processor: folder -> a processor of transformers. All three raise UserError, and are None where the
    layout needs no conversion.
    """

    name: str
    renames: tuple[tuple[str, str], ...]
    config_keys: tuple[str, ...] = ()
    convert: Callable[[Mapping[str, Any], Path], dict[str, Any]] | None = None
    open_source: Callable[[TensorSource, Mapping[str, Any], Path], TensorSource] | None = None
    make_processor: Callable[[Path], Any] | None = None


@dataclass(frozen=True)
class Family:
    """A supported model family.

    model_type: as in config.json. config_class: the configuration class of transformers for it. towers, decoders: the
    supported model_types of vision_config and text_config. tiled: whether images are cut into tiles. single_when_many:
    images are not cut into tiles when several come in one turn.
    """

    name: str
    model_type: str
    config_class: type[PreTrainedConfig]
    towers: tuple[str, ...]
    decoders: tuple[str, ...]
    tiled: bool = False
    single_when_many: bool = False


LAYOUTS = (
    Layout(
        name="authors",
        config_keys=author_layout.CONFIG_KEYS,
        renames=(
            (r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
            (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
            (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
            (r"^model\.mm_projector\.(?=weight|bias)", "multi_modal_projector.linear_1."),
            (r"^model\.image_newline$", "image_newline"),
            (r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "language_model.model."),
            (r"^lm_head\.", "language_model.lm_head."),
        ),
        convert=author_layout.convert_config,
        open_source=author_layout.open_source,
        make_processor=make_processor,
    ),
    Layout(
        name="transformers",  # names of transformers 5, and of older releases, which the llava-hf repositories use
        renames=(
            (r"^model\.(vision_tower|multi_modal_projector|image_newline)\b", r"\1"),
            (r"^model\.language_model\.(?!model\.)", "language_model.model."),
            (r"^lm_head\.", "language_model.lm_head."),
            (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
        ),
    ),
)

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
FAMILIES = (
    Family("LLaVA 1.5, BakLLaVA, LLaVA-Interleave", "llava", LlavaConfig, (CLIP, SIGLIP), ("llama", "mistral", "qwen2")),
    Family("VIP-LLaVA", "vipllava", VipLlavaConfig, (CLIP,), ("llama",)),
    Family("LLaVA-NeXT (1.6)", "llava_next", LlavaNextConfig, (CLIP,), ("llama", "mistral", "qwen2"), tiled=True),
    Family(
        "LLaVA-OneVision",
        "llava_onevision",
        LlavaOnevisionConfig,
        (SIGLIP,),
        ("qwen2",),
        tiled=True,
        single_when_many=True,
    ),
)


def find_layout(config: Mapping[str, Any]) -> Layout:
    """Returns the layout of a checkpoint by its config.json as stored."""
    if "text_config" in config:
        return LAYOUTS[-1]
    return next(layout for layout in LAYOUTS if not layout.config_keys or any(key in config for key in layout.config_keys))


def find_family(config: Mapping[str, Any], where: str) -> Family:
    """Returns the family of a llava-hf config.json. Raises UserError naming its model_type and what is supported."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    supported = "; ".join(f"{family.model_type} ({family.name})" for family in FAMILIES)
    architectures = config.get("architectures")
    named = f" ({', '.join(map(str, architectures))})" if isinstance(architectures, list) and architectures else ""
    raise UserError(
        f"{where}: model_type is {model_type!r}{named}, which is no supported LLaVA; supported: {supported}; and those of "
        "LLaVA's authors, whose config.json has mm_vision_tower"
    )


def make_renamer(layout: Layout) -> Callable[[str], str | None]:
    """Returns a function: stored tensor name -> canonical name, or None for the unused buffers of old checkpoints."""
    patterns = [(re.compile(pattern), replacement) for pattern, replacement in layout.renames]

    def rename(name: str) -> str | None:
        if name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):
            return None
        for pattern, replacement in patterns:
            name = pattern.sub(replacement, name)
        return name

    return rename
